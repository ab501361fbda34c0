"""Comparison of the results of two versions of the code, bit for bit, for refactorings that must not change them.

Record each version in an environment of its own checkout, then compare:

    python benchmarks/same_results.py record before --checkout PATH_TO_THE_OLD_CHECKOUT
    python benchmarks/same_results.py record after
    python benchmarks/same_results.py compare before after

Only commands are used (nnU-Net's and the plugin's), so that the script runs on any version. It records, on synthetic
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


class Recorder:
    """Runner of commands of one checkout in separate nnU-Net folders, which collects their results."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder, self.checkout, self.found = folder.resolve(), checkout.resolve(), dict[str, str]()
        for name in ("raw", "preprocessed", "results"):
            self._of(name).mkdir(parents=True)

    def _of(self, name: str) -> Path:
        return self.folder / f"nnUNet_{name}"

    def run(self, *command: str, **settings: Any) -> None:
        """Run one command with `SETTINGS`, changed section by section."""
        merged = {name: {**section, **settings.get(name, {})} for name, section in SETTINGS.items()}
        (self.folder / "settings.json").write_text(json.dumps(merged))
        folders = {f"nnUNet_{name}": str(self._of(name)) for name in ("raw", "preprocessed", "results")}
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

    def note(self, name: str, content: Any) -> None:
        """Keep the hash of JSON-ready content."""
        self.found[name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def record(self) -> dict[str, str]:
        """All of it; name -> hash."""
        for configuration, (number, name, shape, patients) in DATASETS.items():
            dataset = f"Dataset{number}_{name}"
            self._prepare(configuration, number, name, shape, patients)
            for trainer in ("nnUNetTrainerDVDCL", "nnUNetTrainerSMVDCL"):
                self._train(configuration, number, dataset, trainer)
            self._map_and_evaluate(configuration, number, dataset)
            self._generate(configuration, number, dataset)
        return self.found

    def _prepare(self, configuration: str, number: int, name: str, shape: str, patients: int) -> None:
        self.run("nnunet_cfcl", "phantom", "--out", str(self._of("raw")), "--dataset-id", str(number), "--name", name,
                 "--dim", configuration[0], "--shape", *shape.split(), "--patients", str(patients),
                 "--test-patients", "2", "--train-scanners", "A", "B")
        self.run("nnUNetv2_plan_and_preprocess", "-d", str(number), "-c", configuration, "-np", "1", "-npfp", "1",
                 "--no_pbar")
        folder = self._of("preprocessed") / f"Dataset{number}_{name}"
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        plans["plans_name"] = PLANS
        network = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [n // 4 for n in network["features_per_stage"]]
        plans["configurations"][configuration]["batch_size"] = 2
        (folder / f"{PLANS}.json").write_text(json.dumps(plans))

    def _train(self, configuration: str, number: int, dataset: str, trainer: str) -> None:
        self.run("nnUNetv2_train", str(number), configuration, "0", "-tr", trainer, "-p", PLANS, "-device", "cpu")
        fold, key = self._fold(dataset, configuration, trainer), f"{configuration} {trainer}"
        pretraining = fold / "cfcl" / "pretraining"
        self.note(f"{key}: curve of phase 1", _lines(pretraining / "log.jsonl"))
        self.note(f"{key}: weights of phase 1", _weights(pretraining / "checkpoint_final.pth"))
        self.note(f"{key}: weights of phase 2", _weights(fold / "checkpoint_final.pth"))
        config = json.loads((fold / "cfcl" / "config.json").read_text())
        self.note(f"{key}: config.json", _repeatable(config, self.folder))
        self.note(f"{key}: metrics of phase 2", _repeatable(_logged(fold / "checkpoint_final.pth"), self.folder))

    def _map_and_evaluate(self, configuration: str, number: int, dataset: str) -> None:
        raw, out = self._of("raw") / dataset, self.folder / f"maps_{configuration}"
        self.run("nnunet_cfcl", "predict", "-i", str(raw / "imagesTs"), "-o", str(out), "-d", str(number), "-c",
                 configuration, "-f", "0", "-tr", "nnUNetTrainerDVDCL", "-p", PLANS, "-device", "cpu", "-npp", "1",
                 "-nps", "1", "--chromap")
        self.run("nnunet_cfcl", "evaluate", "-p", str(out), "-g", str(raw / "labelsTs"), "-o",
                 str(self.folder / f"evaluation_{configuration}"), "--attributes", str(raw / "attributes.csv"), "--by",
                 "scanner")
        self._files(f"{configuration}: predict", out, (".png", ".gz"))
        self._files(f"{configuration}: evaluate", self.folder / f"evaluation_{configuration}", (".csv",))

    def _generate(self, configuration: str, number: int, dataset: str) -> None:
        self.run("nnunet_cfcl", "generator", "generate", "-d", str(number), "-c", configuration, "-f", "0", "-p", PLANS,
                 "-device", "cpu", counterfactual={"source": "auto", "interventions": ["scanner"]})
        (folder,) = (self._of("results") / dataset / "cfcl_generators").iterdir()
        self.note(f"{configuration}: generator's curve", _lines(folder / "log.jsonl"))
        self.note(f"{configuration}: generator's weights", _weights(folder / "generator.pth"))
        (report,) = folder.glob("report_*/report.json")
        self.note(f"{configuration}: gate", _repeatable(json.loads(report.read_text()), self.folder))
        for file in sorted(self._of("preprocessed").glob(f"{dataset}/*_cfcl_cf/*/cases/*.b2nd")):
            self.found[f"{configuration}: counterfactual {file.stem}"] = _sha(blosc2.open(str(file))[:].tobytes())

    def _files(self, key: str, folder: Path, endings: tuple[str, ...]) -> None:
        for file in sorted(folder.rglob("*")):
            if file.suffix in endings:
                content = file.read_bytes()
                # NIfTI: data type, geometry and voxels, however they are compressed
                self.found[f"{key}: {file.relative_to(folder)}"] = _sha(
                    gzip.decompress(content) if file.suffix == ".gz" else content)

    def _fold(self, dataset: str, configuration: str, trainer: str) -> Path:
        return self._of("results") / dataset / f"{trainer}__{PLANS}__{configuration}" / "fold_0"


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


def _repeatable(content: Any, folder: Path) -> Any:
    """Drop times, versions and the folder of the run."""
    if isinstance(content, dict):
        return {key: _repeatable(value, folder) for key, value in content.items()
                if not any(word in key.lower() for word in UNREPEATABLE)}
    if isinstance(content, list):
        return [_repeatable(value, folder) for value in content]
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
    """Record or compare; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    record = verbs.add_parser("record", help="run everything and write FOLDER/results.json")
    record.add_argument("folder", type=Path, help="must not exist")
    record.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[1])
    compare = verbs.add_parser("compare", help="exit status 0: all equal")
    compare.add_argument("folders", type=Path, nargs=2)
    arguments = parser.parse_args()
    if arguments.verb == "record":
        found = Recorder(arguments.folder, arguments.checkout).record()
        (arguments.folder / "results.json").write_text(json.dumps(found, indent=1))
        print(f"{len(found)} results in {arguments.folder / 'results.json'}")
        return 0
    return _compare(*(json.loads((folder / "results.json").read_text()) for folder in arguments.folders))


if __name__ == "__main__":
    raise SystemExit(main())
