"""Comparison of the results of two versions of the code, bit for bit, for refactorings that must not change them.

Run both versions into folders of their own, then compare the files:

    python benchmarks/same_results.py run before --checkout PATH_TO_THE_OLD_CHECKOUT
    python benchmarks/same_results.py run after
    python benchmarks/same_results.py compare before after

Only commands are used (nnU-Net's and the plugin's), so that the script runs on any version. Compared are, on synthetic
patients with attributes, loss curves and final weights of two-epoch DVD-CL and S-MVD-CL trainings (both phases, 2D and
3D), a generator's weights, losses, gate metrics and counterfactuals, CHRO-maps, masks, and the tables of ``evaluate``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blosc2
import torch

DATASETS = {"2d": (901, "Phantom2D", "64 64", 12), "3d_fullres": (902, "Phantom3D", "24 32 32", 8)}
TRAINERS = ("nnUNetTrainerDVDCL", "nnUNetTrainerSMVDCL")
PLANS = "tinyPlans"
GENERATOR = {"epochs": 2, "iterations_per_epoch": 2, "images_per_step": 2, "width": 8, "blocks": 1,
             "finetune_epochs": 1, "samples_every": 1}
SETTINGS: dict[str, Any] = {
    "pretrain": {"epochs": 2, "iterations_per_epoch": 2, "images_per_step": 2, "points_per_image": 100},
    "counterfactual": {"count": 2, "source": "acquisition"},
    "finetune": {"epochs": 2, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1, "mirror_axes": []},
    "chromap": {"reducer": "pca", "samples": 2000},
    "generator": GENERATOR,
    "gate": {"predictor_steps": 5, "segmenter_steps": 2, "cases": 8, "enabled": False},
}
#: Keys of times and paths, which differ between runs.
UNREPEATABLE = ("second", "time", "memory", "created", "written", "gib", "version", "folder", "path")
#: Keys of sentences of the gate's report, which may be worded differently.
WORDING = ("reasons", "remarks")


class Runner:
    """Runs commands of one checkout in nnU-Net folders of their own."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder, self.checkout = folder.resolve(), checkout.resolve()
        for name in ("raw", "preprocessed", "results"):
            (self.folder / f"nnUNet_{name}").mkdir(parents=True)

    def run(self, *command: str, **settings: Any) -> None:
        """Run one command with `SETTINGS`, changed section by section."""
        merged = {name: {**section, **settings.get(name, {})} for name, section in SETTINGS.items()}
        (self.folder / "settings.json").write_text(json.dumps(merged))
        folders = {f"nnUNet_{name}": str(self.folder / f"nnUNet_{name}") for name in ("raw", "preprocessed", "results")}
        scripts = Path(sys.executable).parent
        environment = {
            **os.environ, **folders, "nnUNet_cfcl_config": str(self.folder / "settings.json"), "nnUNet_def_n_proc": "1",
            # a single thread sums in a fixed order
            "nnUNet_n_proc_DA": "1" if "plan" in command[0] else "0", "OMP_NUM_THREADS": "1",
            "nnUNet_extTrainer": str(self.checkout / "trainers"), "PYTHONPATH": str(self.checkout),
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        }
        print("$", *command, flush=True)
        done = subprocess.run(command, env=environment, cwd=self.folder, text=True, capture_output=True)
        if done.returncode:
            output = (done.stdout + done.stderr)[-5000:]
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{output}")

    def run_all(self) -> None:
        """Prepare the datasets, train, predict, evaluate, generate."""
        for configuration, (number, name, shape, patients) in DATASETS.items():
            self._prepare(configuration, number, name, shape, patients)
            for trainer in TRAINERS:
                self.run("nnUNetv2_train", str(number), configuration, "0", "-tr", trainer, "-p", PLANS, "-device",
                         "cpu")
            self._map_and_evaluate(configuration, number, f"Dataset{number}_{name}")
            self.run("nnunet_cfcl", "generator", "generate", "-d", str(number), "-c", configuration, "-f", "0", "-p",
                     PLANS, "-device", "cpu", counterfactual={"source": "auto", "interventions": ["scanner"]})

    def _prepare(self, configuration: str, number: int, name: str, shape: str, patients: int) -> None:
        self.run("nnunet_cfcl", "phantom", "--out", str(self.folder / "nnUNet_raw"), "--dataset-id", str(number),
                 "--name", name, "--dim", configuration[0], "--shape", *shape.split(), "--patients", str(patients),
                 "--test-patients", "2", "--train-scanners", "A", "B")
        self.run("nnUNetv2_plan_and_preprocess", "-d", str(number), "-c", configuration, "-np", "1", "-npfp", "1",
                 "--no_pbar")
        folder = self.folder / "nnUNet_preprocessed" / f"Dataset{number}_{name}"
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        plans["plans_name"] = PLANS
        network = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [n // 4 for n in network["features_per_stage"]]
        plans["configurations"][configuration]["batch_size"] = 2
        (folder / f"{PLANS}.json").write_text(json.dumps(plans))

    def _map_and_evaluate(self, configuration: str, number: int, dataset: str) -> None:
        raw, out = self.folder / "nnUNet_raw" / dataset, self.folder / f"maps_{configuration}"
        self.run("nnunet_cfcl", "predict", "-i", str(raw / "imagesTs"), "-o", str(out), "-d", str(number), "-c",
                 configuration, "-f", "0", "-tr", "nnUNetTrainerDVDCL", "-p", PLANS, "-device", "cpu", "-npp", "1",
                 "-nps", "1", "--chromap")
        self.run("nnunet_cfcl", "evaluate", "-p", str(out), "-g", str(raw / "labelsTs"), "-o",
                 str(self.folder / f"evaluation_{configuration}"), "--attributes", str(raw / "attributes.csv"), "--by",
                 "scanner")


def results(folder: Path) -> dict[str, str]:
    """Hash every result in a folder of `Runner`; name -> hash."""
    folder, found = folder.resolve(), dict[str, str]()
    for configuration, (number, name, *_) in DATASETS.items():
        dataset = f"Dataset{number}_{name}"
        for trainer in TRAINERS:
            fold = folder / "nnUNet_results" / dataset / f"{trainer}__{PLANS}__{configuration}" / "fold_0"
            found |= {f"{configuration} {trainer}: {key}": value for key, value in _training(fold, folder).items()}
        (generator,) = (folder / "nnUNet_results" / dataset / "cfcl_generators").iterdir()
        (report,) = generator.glob("report_*/report.json")
        found[f"{configuration}: generator's curve"] = _json_hash(_lines(generator / "log.jsonl"))
        found[f"{configuration}: generator's weights"] = _json_hash(_weights(generator / "generator.pth"))
        found[f"{configuration}: gate"] = _json_hash(_repeatable(json.loads(report.read_text()), folder, WORDING))
        for file in sorted(folder.glob(f"nnUNet_preprocessed/{dataset}/*_cfcl_cf/*/cases/*.b2nd")):
            found[f"{configuration}: counterfactual {file.stem}"] = _sha(blosc2.open(str(file))[:].tobytes())
        found |= _files(f"{configuration}: predict", folder / f"maps_{configuration}", (".png", ".gz"))
        found |= _files(f"{configuration}: evaluate", folder / f"evaluation_{configuration}", (".csv",))
    return found


def _training(fold: Path, folder: Path) -> dict[str, str]:
    pretraining = fold / "cfcl" / "pretraining"
    return {
        "curve of phase 1": _json_hash(_lines(pretraining / "log.jsonl")),
        "weights of phase 1": _json_hash(_weights(pretraining / "checkpoint_final.pth")),
        "weights of phase 2": _json_hash(_weights(fold / "checkpoint_final.pth")),
        "config.json": _json_hash(_repeatable(json.loads((fold / "cfcl" / "config.json").read_text()), folder)),
        "metrics of phase 2": _json_hash(_repeatable(_logged(fold / "checkpoint_final.pth"), folder)),
    }


def _files(key: str, folder: Path, endings: tuple[str, ...]) -> dict[str, str]:
    files = {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.suffix in endings}
    # NIfTI: header and voxels, however they are compressed
    return {f"{key}: {file.relative_to(folder)}": _sha(gzip.decompress(content) if file.suffix == ".gz" else content)
            for file, content in files.items()}


def _json_hash(content: Any) -> str:
    return _sha(json.dumps(content, sort_keys=True).encode())


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _tensors(value, f"{name}.{key}")


def _weights(file: Path) -> dict[str, str]:
    content = torch.load(file, map_location="cpu", weights_only=False)
    found = {name: _sha(tensor.contiguous().numpy().tobytes()) for name, tensor in _tensors(content)}
    if not found:
        raise SystemExit(f"{file} holds no weights")
    return found


def _logged(file: Path) -> Any:
    return json.loads(json.dumps(torch.load(file, map_location="cpu", weights_only=False)["logging"], default=str))


def _repeatable(content: Any, folder: Path, dropped: tuple[str, ...] = ()) -> Any:
    """Drop times, versions, the folder of the run, and the keys ``dropped``."""
    if isinstance(content, dict):
        return {key: _repeatable(value, folder, dropped) for key, value in content.items()
                if key not in dropped and not any(word in key.lower() for word in UNREPEATABLE)}
    if isinstance(content, list):
        return [_repeatable(value, folder, dropped) for value in content]
    return content.replace(str(folder), "") if isinstance(content, str) else content


def _lines(file: Path) -> list[Any]:
    lines = [_repeatable(json.loads(line), file.parent) for line in file.read_text().splitlines()]
    if not lines:
        raise SystemExit(f"{file} is empty")
    return lines


def _compare(before: dict[str, str], after: dict[str, str]) -> int:
    """Print every difference; return 1 if there is any."""
    names = sorted({*before, *after})
    different = [name for name in names if before.get(name) != after.get(name)]
    for name in different:
        print(f"DIFFERENT  {name}: {before.get(name, 'missing')} before, {after.get(name, 'missing')} after")
    print(f"{len(names) - len(different)} of {len(names)} results are bit-equal")
    return int(bool(different) or not names)


def main() -> int:
    """Run or compare; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run everything in FOLDER")
    run.add_argument("folder", type=Path, help="must not exist")
    run.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[1])
    compare = verbs.add_parser("compare", help="exit status 0: all equal")
    compare.add_argument("folders", type=Path, nargs=2)
    arguments = parser.parse_args()
    if arguments.verb == "run":
        Runner(arguments.folder, arguments.checkout).run_all()
        return 0
    return _compare(*map(results, arguments.folders))


if __name__ == "__main__":
    raise SystemExit(main())
