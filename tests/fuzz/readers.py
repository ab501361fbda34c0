"""Every reader of files: how a valid file is made, and what is done with one."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from nnunet_cfcl.chromap.color_space import ColorSpace
from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual.generator.generation import _read_record
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator
from nnunet_cfcl.counterfactual.generator.training import save_generator
from nnunet_cfcl.counterfactual.store import MANIFEST, CounterfactualStore
from nnunet_cfcl.data.attribute_table import read_attribute_table, read_declared_kinds
from nnunet_cfcl.data.patients import known_patients, store_patients
from nnunet_cfcl.data.pool.check import _quietly, _Unreadable, read_probabilities
from nnunet_cfcl.data.pool.find_cases import read_qualities
from nnunet_cfcl.data.pool.manifest import CaseRecord, Manifest, manifest_file, read_manifest, write_manifest
from nnunet_cfcl.data.pool.silver_model import (
    RECORD,
    LabelState,
    SilverModel,
    SilverRecord,
    foreign_files,
    read_record,
    write_record,
)
from nnunet_cfcl.doctor.dataset import check_settings
from nnunet_cfcl.evaluation.masks.tables import find_labels, join_attributes
from nnunet_cfcl.evaluation.probe.models import read_weights
from nnunet_cfcl.evaluation.report import sections
from nnunet_cfcl.evaluation.report.blocks import Chapter, Section
from nnunet_cfcl.evaluation.report.fold_folder import read_fold
from nnunet_cfcl.evaluation.report.metrics import metrics_blocks, read_metrics
from nnunet_cfcl.evaluation.report.page import render
from nnunet_cfcl.evaluation.report.pictures import BrokenPicture, embed
from nnunet_cfcl.nnunet import lookup
from nnunet_cfcl.nnunet.label_files import read_label_file
from nnunet_cfcl.phases.attributes_of_cases import KnownAttributes, coding_and_interventions, known_attributes
from nnunet_cfcl.runs.checkpoint import load_checkpoint, save_checkpoint
from nnunet_cfcl.runs.epoch_log import read_log
from nnunet_cfcl.trainers.export_stock import _load, stock_checkpoint
from tests.counterfactual.random_generator import random_generator
from tests.evaluation.report.fold_folders import write_complete, write_picture

CASES = tuple(f"case_{number:02d}" for number in range(24))
DATASET, BLOCK = "Dataset901_Made", {"pretrain": {"epochs": 3}, "acquisition.gamma": [0.6, 1.5], "seed": 1}
SILVER_MODEL = SilverModel("nnUNetTrainer", "nnUNetPlans", "2d", "0", "abc", CASES[4:])
ARRAY = np.random.default_rng(0).normal(size=(1, 4, 12, 10)).astype(np.float32)


@dataclass(frozen=True)
class Reader:
    """A reader of one kind of file.

    Attributes:
        name: of the kind of file.
        file: what is damaged, in the folder.
        kind: of `mutations.inputs`.
        make: writes valid files into a folder.
        read: reads them as the package does, and uses what it has read.
        refusal: a further error that is meant, of readers whose caller catches it.
        called: what errors may call the file besides its name.
    """

    name: str
    file: str
    kind: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    refusal: type[Exception] | None = None
    called: tuple[str, ...] = ()


def _write_table(file: Path) -> None:
    with open(file, "w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["case", "patient", "scanner", "age"])
        table.writerows([case, f"P{number // 2}", "AB"[number % 2], 20 + number] for number, case in enumerate(CASES))


def _use(known: KnownAttributes | None) -> None:
    if known is not None:
        coding, _ = coding_and_interventions(known, CASES, CASES, ".png", None, lambda line: None)
        for cells in known.cells(CASES).values():
            coding.encode(cells)


def _read_table(folder: Path) -> None:
    table = read_attribute_table(folder)
    assert table is not None
    _use(KnownAttributes(table.attributes, read_declared_kinds(folder), "attributes.csv"))


def _make_copy(folder: Path) -> None:
    raw = folder / "raw" / folder.name
    raw.mkdir(parents=True)
    _write_table(raw / "attributes.csv")
    with mock.patch.dict(os.environ, {"nnUNet_raw": str(folder / "raw")}):
        known_attributes(folder)


def _read_copy(folder: Path) -> None:
    with mock.patch.dict(os.environ, {"nnUNet_raw": ""}):
        _use(known_attributes(folder))


def _make_plan(folder: Path) -> None:
    configuration = {"data_identifier": "nnUNetPlans_2d", "patch_size": [32, 32], "spacing": [1, 1],
                     "normalization_schemes": ["ZScoreNormalization"], "architecture": {}, "cfcl": BLOCK}
    (folder / DATASET).mkdir()
    (folder / DATASET / "dataset.json").write_text('{"labels": {"background": 0}}')
    (folder / DATASET / "nnUNetPlans.json").write_text(json.dumps(
        {"dataset_name": DATASET, "plans_name": "nnUNetPlans", "configurations": {"2d": configuration}}))


def _read_plan(folder: Path) -> None:
    with mock.patch.dict(os.environ, {"nnUNet_preprocessed": str(folder)}):
        plan = lookup.load_plan(DATASET, "nnUNetPlans", "2d")
        block = lookup.load_configuration(plan, "nnUNetPlans", "2d")
        check_settings(block)


def _make_store(folder: Path) -> None:
    store = CounterfactualStore.create(folder, ["scanner", "low_field"], "test", "plans_2d", "abc")
    store.write("case", "scanner", ARRAY, (1, 2, 8, 8), (1, 1, 4, 4))


def _read_store(folder: Path) -> None:
    store = CounterfactualStore.open(folder)
    assert store.shape("case", "scanner") == ARRAY.shape
    found = store.read("case", "scanner", (slice(1, 3), slice(0, 12), slice(2, 9)))
    assert np.array_equal(found, ARRAY[:, 1:3, :, 2:9]), "another array than was written"


def _make_record(folder: Path) -> None:
    (folder / "attributes.json").write_text(json.dumps({case: {"scanner": {"scanner": "B"}} for case in CASES[:3]}))


def _make_pool(folder: Path) -> None:
    records = {case: CaseRecord((1, 4, 8, 8), True, 0.5, True, False, (f"{case}.b2nd", f"{case}.pkl"), "ab", "cd")
               for case in CASES[:3]}
    write_manifest(folder / "pool", Manifest("abc", True, records, SILVER_MODEL, CASES[:2]))


def _read_pool(folder: Path) -> None:
    manifest = read_manifest(folder / "pool")
    assert manifest is not None
    manifest.content()
    manifest.with_silver(0.4)


def _checkpoint(optimizer: bool = True) -> dict[str, object]:
    network = torch.nn.Conv2d(1, 2, 3)
    return {"network_weights": network.state_dict(), "epoch": 3, "hash": "abc", "trainer_name": "nnUNetTrainerDVDCL",
            "init_args": {"configuration": "2d", "fold": 0}, "identity": {"cases": list(CASES), "seed": np.float64(1)},
            **({"optimizer_state": torch.optim.SGD(network.parameters(), 0.1, 0.9).state_dict()} if optimizer else {})}


def _make_space(folder: Path) -> None:
    features = np.random.default_rng(0).normal(size=(80, 6))
    ColorSpace.fit(features, reducer="pca", identity="abc").save(folder / "chromap_space.npz")


def _read_space(folder: Path) -> None:
    space = ColorSpace.load(folder / "chromap_space.npz")
    space.transform(np.ones((3, space.features), np.float32))


def _write_labels(folder: Path) -> None:
    (folder / "dataset.json").write_text(json.dumps(
        {"labels": {"background": 0, "organ": [1, 2], "lesion": 2, "ignore": 3}, "file_ending": ".png"}))


def _read_join(folder: Path) -> None:
    join_attributes(folder / "attributes.csv", CASES, ".png").groupings(["scanner"], CASES)


def _make_evaluation(folder: Path) -> None:
    records = [{"method": "a", "label": 1, "metric": "dice", "grouping": grouping, "group": "all", "cases": 5,
                "patients": 5, "mean": 0.5, "low": 0.4, "high": None} for grouping in ("all", "site")]
    gap = {"method": "a", "label": 1, "metric": "dice", "grouping": "site", "gap": 0.1, "low": 0, "high": 1,
           "worst": "n", "best": "s"}
    (folder / "metrics.json").write_text(json.dumps({
        "format": 1, "settings": {"unit": "mm", "label_names": {"1": "organ"}}, "summaries": records, "gaps": [gap],
        "differences": []}))


def _read_evaluation(folder: Path) -> None:
    metrics = read_metrics(folder)
    _page([Section("metrics", "Metrics", "", "", metrics_blocks(metrics, metrics.methods, 400))])


def _page(shown: list[Section]) -> None:
    render([Chapter("fold1", "title", "words", (), shown)]).encode("utf-8")


def _read_fold(folder: Path) -> None:
    fold = read_fold(folder / fold_place())
    _page([sections.overview(fold), sections.settings(fold), sections.gate(fold, 200), sections.probe(fold, 200)])


def fold_place() -> str:
    """Of the fold that `write_complete` makes."""
    return "nnUNet_results/Dataset901_Made/nnUNetTrainerDVDCL__nnUNetPlans__2d/fold_0"


def _of_fold(name: str, file: str, kind: str = "json") -> Reader:
    return Reader(name, f"{fold_place()}/{file}", kind, _make_fold, _read_fold)


def _make_fold(folder: Path) -> None:
    write_complete(folder)


def _write_nifti(folder: Path) -> None:
    import SimpleITK

    SimpleITK.WriteImage(SimpleITK.GetImageFromArray((ARRAY[0] > 0).astype(np.uint8)), str(folder / "mask.nii.gz"))


def _write_png(folder: Path) -> None:
    Image.fromarray((ARRAY[0, 0] > 0).astype(np.uint8)).save(folder / "mask.png")


def _make_log(folder: Path) -> None:
    lines = [{"epoch": number, "loss": 1 / (1 + number), "seconds": 3.5} for number in range(5)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_qualities(folder: Path) -> None:
    read_qualities(folder / "silver.csv", set(CASES), ".png", [])


def _write_qualities(folder: Path) -> None:
    (folder / "silver.csv").write_text("case,quality\n" + "".join(f"{case},0.{n}\n" for n, case in enumerate(CASES)))


def _save_checkpoint(folder: Path) -> None:
    save_checkpoint(_checkpoint(), folder / "a.pth")


READERS: tuple[Reader, ...] = (
    Reader("attributes.csv", "attributes.csv", "text", lambda folder: _write_table(folder / "attributes.csv"),
           _read_table, called=("an intervention's name",)),
    Reader("attributes.json", "attributes.json", "json", lambda folder: (folder / "attributes.json").write_text(
        '{"scanner": "categorical", "age": "continuous"}'), read_declared_kinds),
    Reader("copy of the attributes", "cfcl_attributes.json", "json", _make_copy, _read_copy,
           called=("attributes.csv", "attributes.json", "an intervention's name")),
    Reader("copy of the patients", "cfcl_patients.json", "json", lambda folder: store_patients(
        folder, dict(zip(CASES, CASES[::-1]))), lambda folder: known_patients(None, folder).of("case_03")),
    Reader("silver.csv", "silver.csv", "text", _write_qualities, _read_qualities),
    Reader("settings", "settings.json", "json", lambda folder: (folder / "settings.json").write_text(
        json.dumps(BLOCK)), lambda folder: resolve_settings(None, folder / "settings.json").to_dict()),
    Reader("plan with its cfcl block", f"{DATASET}/nnUNetPlans.json", "json", _make_plan, _read_plan,
           called=("the plan",)),
    Reader("store: manifest", MANIFEST, "json", _make_store, _read_store),
    Reader("store: counterfactual", "cases/case__scanner.b2nd", "binary", _make_store, _read_store),
    Reader("store: record of attributes", "attributes.json", "json", _make_record,
           lambda folder: _read_record(folder / "attributes.json")),
    Reader("pool manifest", manifest_file(Path("pool")).name, "json", _make_pool, _read_pool),
    Reader("silver labels: record of the model", RECORD, "json",
           lambda folder: write_record(folder, SilverRecord(SILVER_MODEL, {"case": LabelState("ab", "cd")})),
           lambda folder: list(foreign_files(folder, read_record(folder), ".png"))),
    Reader("pretraining checkpoint", "a.pth", "zip", _save_checkpoint,
           lambda folder: load_checkpoint(folder / "a.pth")),
    Reader("generator checkpoint", "g.pth", "zip", lambda folder: save_generator(random_generator(), folder / "g.pth"),
           lambda folder: CounterfactualGenerator.load(folder / "g.pth")),
    Reader("checkpoint to be probed", "a.pth", "zip", _save_checkpoint,
           lambda folder: read_weights(folder / "a.pth")),
    Reader("checkpoint to be exported", "a.pth", "zip", _save_checkpoint,
           lambda folder: stock_checkpoint(_load(folder / "a.pth")), called=("not a checkpoint of an nnU-Net",)),
    Reader("colour space", "chromap_space.npz", "zip", _make_space, _read_space),
    Reader("epoch log", "log.jsonl", "text", _make_log, lambda folder: read_log(folder / "log.jsonl")),
    Reader("evaluate: dataset.json", "dataset.json", "json", _write_labels, lambda folder: find_labels(folder, folder)),
    Reader("evaluate: table of attributes", "attributes.csv", "text",
           lambda folder: _write_table(folder / "attributes.csv"), _read_join, called=("to group by",)),
    Reader("evaluate: mask, NIfTI", "mask.nii.gz", "binary", _write_nifti,
           lambda folder: read_label_file(folder / "mask.nii.gz")),
    Reader("evaluate: mask, PNG", "mask.png", "binary", _write_png,
           lambda folder: read_label_file(folder / "mask.png")),
    Reader("silver: saved probabilities", "p.npz", "zip",
           lambda folder: np.savez_compressed(folder / "p.npz", probabilities=ARRAY),
           lambda folder: _quietly(lambda: read_probabilities(folder / "p.npz")), _Unreadable),
    Reader("report: metrics.json", "metrics.json", "json", _make_evaluation, _read_evaluation),
    _of_fold("report: config.json", "cfcl/config.json"),
    _of_fold("report: log.jsonl", "cfcl/pretraining/log.jsonl", "text"),
    _of_fold("report: gate's report.json", "cfcl/generator/report/report.json"),
    _of_fold("report: probe.json", "cfcl/probe/probe.json"),
    _of_fold("report: nnU-Net's summary.json", "validation/summary.json"),
    _of_fold("report: nnU-Net's training log", "training_log_2026_5_1_10_00_00.txt", "text"),
    Reader("report: picture", "a.png", "binary", lambda folder: write_picture(folder / "a.png"),
           lambda folder: embed(folder / "a.png", "alt"), BrokenPicture),
)
