"""kill -9 at random moments of every phase of the real commands: all goes on, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from PIL import Image

from nnunet_cfcl.data.pool.manifest import manifest_file, pool_folder, read_manifest
from tests.end_to_end.conftest import PLANS, TRAINER, NnUNet
from tests.end_to_end.kills import RECORD_VARIABLE, Killer, Phase, lengths, same, unfinished_files

pytestmark = pytest.mark.end_to_end

DATASET = "Dataset012_ChestXraysPool"
TRAIN = ("nnUNetv2_train", "12", "2d", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
POOL = ("nnunet_cfcl", "pool", "-d", "12", "-c", "2d", "-p", PLANS, "-np", "2")
EPOCHS = 8


def _training_phase(name: str, begins: str, ends: str) -> Phase:
    return Phase(name, TRAIN, (*TRAIN, "--c"), begins, ends)


PRETRAINING = _training_phase("pretraining", "Phase 1: ", "Phase 1 done")
FINE_TUNING = _training_phase("fine-tuning", "This is the configuration used by this training", "Training done")
GENERATOR = _training_phase("generator training", "Phase 0: ", f"Generator training epoch {EPOCHS - 1}")
GENERATION = _training_phase("generation", "Gate, intervention", "Phase 1: ")
PREPROCESSING = Phase("pool", POOL, POOL)
#: Kills of the nightly test, in the order of the phases.
TIMES = {"pool": 6, "generator training": 7, "generation": 4, "pretraining": 7, "fine-tuning": 7, "CHRO-map export": 6}


def _copy(nnunet: NnUNet, root: Path, **settings: object) -> NnUNet:
    """Folders of its own for a run that is reproducible to the bit."""
    copied = nnunet.copy(root)
    copied.variables.update(nnUNet_n_proc_DA="0", OMP_NUM_THREADS="1")
    copied.settings(**settings)
    return copied


def _losses(fold: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (fold / "cfcl/pretraining/log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def _assert_same_fold(one: Path, other: Path) -> None:
    """Losses at every step, weights and optimiser of both phases, colours of CHRO-maps."""
    assert _losses(one) == _losses(other)
    for name, keys in (("cfcl/pretraining/checkpoint_final.pth", ("network_weights", "optimizer_state")),
                       ("checkpoint_final.pth", ("network_weights", "optimizer_state"))):
        first, second = (torch.load(fold / name, weights_only=False) for fold in (one, other))
        assert all(same(first[key], second[key]) for key in keys), name
    curves = [torch.load(fold / "checkpoint_final.pth", weights_only=False)["logging"] for fold in (one, other)]
    for key in ("train_losses", "val_losses"):
        assert np.array_equal(curves[0][key], curves[1][key]), key
    spaces = [np.load(fold / "cfcl/chromap_space.npz") for fold in (one, other)]
    assert all(np.array_equal(spaces[0][key], spaces[1][key]) for key in spaces[0].files)


def _assert_nothing_unfinished(nnunet: NnUNet) -> None:
    """A checkpoint of nnU-Net's that was killed while it was written is written again only if it is the best again."""
    left = [file.name for file in unfinished_files(nnunet)]
    assert set(left) <= {"checkpoint_best.pth.tmp"}, left


def test_a_training_killed_at_random_moments_of_both_phases_ends_as_an_undisturbed_one(chest_xrays_with_pool, tmp_path):
    short = {"pretrain": {"epochs": 3}, "finetune": {"epochs": 3}}
    calm, killed = (_copy(chest_xrays_with_pool, tmp_path / name, **short) for name in ("calm", "killed"))
    found = lengths(calm, [PRETRAINING, FINE_TUNING])
    killer = Killer(killed, seed=1)
    killer.kill(PRETRAINING, 1, found["pretraining"])
    killer.kill(FINE_TUNING, 1, found["fine-tuning"])
    killed.run_until("Colour space of CHRO-maps:", *FINE_TUNING.again)  # nnU-Net's validation comes after it
    assert [one.outcome for one in killer.record] == ["killed", "killed"]
    _assert_same_fold(calm.fold(DATASET, "2d"), killed.fold(DATASET, "2d"))
    _assert_nothing_unfinished(killed)


def _pool(nnunet: NnUNet) -> Path:
    return pool_folder(nnunet.folder("preprocessed") / DATASET / "nnUNetPlans_2d")


def _remove_pool(nnunet: NnUNet) -> None:
    for file in _pool(nnunet).iterdir():
        file.unlink()
    manifest_file(_pool(nnunet)).unlink()


def _assert_same_pool(calm: NnUNet, killed: NnUNet) -> None:
    one, other = (read_manifest(_pool(nnunet)) for nnunet in (calm, killed))
    assert one is not None and other is not None and other.complete and one.content() == other.content()
    for record in other.cases.values():
        for name in record.files:
            if name.endswith(".b2nd"):
                arrays = [blosc2.open(str(_pool(nnunet) / name))[:] for nnunet in (calm, killed)]
                assert np.array_equal(*arrays), name


def _assert_same_counterfactuals(calm: NnUNet, killed: NnUNet) -> None:
    generators = [sorted(nnunet.folder("results").glob(f"{DATASET}/cfcl_generators/*/generator.pth"))
                  for nnunet in (calm, killed)]
    stores = [sorted(nnunet.folder("preprocessed").glob(f"{DATASET}/*_cfcl_cf/*/cases/*.b2nd"))
              for nnunet in (calm, killed)]
    assert len(generators[0]) == len(generators[1]) == 1
    assert same(*(torch.load(files[0], weights_only=False)["generator"] for files in generators))
    assert [file.name for file in stores[0]] == [file.name for file in stores[1]] and len(stores[0]) > 10
    for pair in zip(*stores):
        assert np.array_equal(*(blosc2.open(str(file))[:] for file in pair)), pair


def _export(nnunet: NnUNet, model: Path) -> Phase:
    images = nnunet.folder("raw") / DATASET / "imagesUn"
    command = ("nnunet_cfcl", "predict", "--chromap", "-i", str(images), "-o", str(nnunet.root / "maps"), "-m",
               str(model), "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1")
    return Phase("CHRO-map export", command, (*command, "--continue_prediction"))


def _assert_same_pictures(calm: NnUNet, killed: NnUNet) -> None:
    files = [sorted((nnunet.root / "maps").rglob("*.png")) for nnunet in (calm, killed)]
    assert len(files[0]) == 32 and [file.name for file in files[0]] == [file.name for file in files[1]]
    for pair in zip(*files):
        assert np.array_equal(*(np.asarray(Image.open(file)) for file in pair)), pair
    summaries = [json.loads((nnunet.root / "maps/chromap/summary.json").read_text()) for nnunet in (calm, killed)]
    assert summaries[0]["cases"].keys() == summaries[1]["cases"].keys() and not summaries[1]["failures"]


@pytest.mark.nightly
def test_thirty_kills_over_all_phases_change_nothing(chest_xrays_with_pool, tmp_path):
    settings = {
        "pretrain": {"epochs": EPOCHS, "iterations_per_epoch": 4},
        "finetune": {"epochs": EPOCHS, "iterations_per_epoch": 4},
        "counterfactual": {"source": "auto", "count": 2, "interventions": ["scanner"]},
        "generator": {"epochs": EPOCHS, "iterations_per_epoch": 4, "images_per_step": 2, "width": 8, "blocks": 1,
                      "samples_every": 4},
        "gate": {"enabled": False, "predictor_steps": 5, "segmenter_steps": 2, "cases": 8},
    }
    calm, killed = (_copy(chest_xrays_with_pool, tmp_path / name, **settings) for name in ("calm", "killed"))
    killer = Killer(killed, seed=7)
    for nnunet in (calm, killed):
        _remove_pool(nnunet)
    found = lengths(calm, [PREPROCESSING])
    killer.kill(PREPROCESSING, TIMES["pool"], found["pool"])
    killed.run(*POOL)
    _assert_same_pool(calm, killed)

    phases = [GENERATOR, GENERATION, PRETRAINING, FINE_TUNING]
    found |= lengths(calm, phases)
    for phase in phases:
        killer.kill(phase, TIMES[phase.name], found[phase.name])
    killed.run(*FINE_TUNING.again)
    _assert_same_counterfactuals(calm, killed)
    _assert_same_fold(calm.fold(DATASET, "2d"), killed.fold(DATASET, "2d"))

    exports = [_export(nnunet, nnunet.fold(DATASET, "2d").parent) for nnunet in (calm, killed)]
    found |= lengths(calm, exports[:1])
    killer.kill(exports[1], TIMES["CHRO-map export"], found["CHRO-map export"])
    killed.run(*exports[1].again)
    _assert_same_pictures(calm, killed)

    _assert_nothing_unfinished(killed)
    count = sum(one.outcome == "killed" for one in killer.record)
    killer.write(Path(os.environ.get(RECORD_VARIABLE, tmp_path / "kills.json")), seconds_undisturbed={
        name: round(length, 3) for name, length in found.items()}, result="as undisturbed")
    assert count >= 30, killer.record
