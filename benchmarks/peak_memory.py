"""Peak memory of every command on real images, against documented limits.

    python benchmarks/peak_memory.py --dataset hippocampus --work WORK --out benchmark_results

nnU-Net's own plan, network and batch; trainings and generator run a few steps, since the length of a run has no effect.
Sampled ten times per second over all processes of a command (data loading, preprocessing and export included): the sum
of their proportional set sizes, which counts shared pages once, and the largest resident set of a single process. No
other process of the same environment may run, since it would share the pages of libraries. Writes
``peak_memory_DATASET.json`` and ``.md``; exits with status 1 where a limit is exceeded. Linux, CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "domain_shift"))
from study_data import write_chest_x_rays, write_hippocampi

from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.nnunet.installation import trainers_path

TRAINER = "nnUNetTrainerDVDCL"
SETTINGS: dict[str, Any] = {
    "pretrain": {"epochs": 1, "iterations_per_epoch": 2, "images_per_step": 4},
    "counterfactual": {"source": "auto", "interventions": ["scanner"]},
    "generator": {"epochs": 1, "iterations_per_epoch": 3, "images_per_step": 4, "memory_gb": 0.5,
                  "finetune_epochs": 0},
    "gate": {"enabled": False, "predictor_steps": 5, "segmenter_steps": 2, "cases": 4},
    "finetune": {"epochs": 1, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1},
}
LABELLED, UNLABELLED, TESTED, SIDE = 10, 8, 4, 128
SECONDS_BETWEEN = 0.1

#: Name of the dataset in nnU-Net, and its configuration.
DATASETS = {
    "cxr": ("Dataset710_PeakChestXrays", "2d"),
    "hippocampus": ("Dataset810_PeakHippocampus", "3d_fullres"),
}
#: Limits in docs/results/benchmarks.md, in MiB for all processes of a command: a quarter above the measured peak,
#: rounded up to 250.
PROMISED = {
    "nnUNetv2_plan_and_preprocess": 5750,
    "nnunet_cfcl pool": 2000,
    "nnunet_cfcl generator train": 2500,
    "nnunet_cfcl generator report": 2000,
    "nnunet_cfcl generator generate": 1750,
    "nnUNetv2_train, phase 1": 2500,
    "nnUNetv2_train, phase 2": 3000,
    "nnUNetv2_train, validation and colour space": 3500,
    "nnUNetv2_predict": 3000,
    "nnunet_cfcl predict --chromap": 2750,
    "nnunet_cfcl evaluate": 2750,
    "nnunet_cfcl probe": 2000,
    "nnunet_cfcl report": 2750,
}
WRITERS = {"cxr": write_chest_x_rays, "hippocampus": write_hippocampi}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", choices=tuple(DATASETS), required=True)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CFCL_TEST_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, required=True, help="folder for nnU-Net's files; a new one")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--workers", type=int, default=2, help="data loading processes of trainings")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    return parser.parse_args()


@dataclass
class Peak:
    """Peak memory of a group of processes in MiB.

    Attributes:
        together: sum of their proportional set sizes.
        largest: largest resident set of a single process.
    """

    together: float = 0.0
    largest: float = 0.0

    def look(self, session: int) -> None:
        """Measure the processes of a session once."""
        found = [sizes for process in processes_of(session) if (sizes := memory_of(process))]
        self.together = max(self.together, sum(shared for shared, _ in found))
        self.largest = max(self.largest, *(resident for _, resident in found), 0.0)


def processes_of(session: int) -> Iterator[Path]:
    """List the ``/proc`` folders of the processes of a session."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # after the name, which may contain any character: state, parent, group, session
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # the process has ended
            if int(fields[3]) == session:
                yield folder


def memory_of(process: Path) -> tuple[float, float] | None:
    """Read proportional and resident set size of a process in MiB; None where it has ended."""
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    sizes = {name: int(text.split()[0]) / 1024 for name, _, text in (line.partition(":") for line in lines)}
    return sizes["Pss"], sizes["Rss"]


@dataclass(frozen=True)
class Command:
    """Command line.

    Attributes:
        name: name of the command, or of its first part.
        words: words of the command line.
        then: text in the output -> name of the part that starts with it.
    """

    name: str
    words: Sequence[str]
    then: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Measured:
    """Runner of commands that records their peak memory.

    Attributes:
        log: file of their output.
        environment: environment variables of the commands.
        peaks: name -> peak memory.
    """

    log: Path
    environment: Mapping[str, str]
    peaks: dict[str, Peak] = field(default_factory=dict)

    def run(self, command: Command) -> None:
        """Run a command.

        Raises:
            RuntimeError: the command failed; the message has the log file.
        """
        print(" ".join(command.words), flush=True)
        process = subprocess.Popen(command.words, env=dict(self.environment), text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        current = [command.name]
        watcher = threading.Thread(target=self._watch, args=(process, current), daemon=True)
        watcher.start()
        try:
            with open(self.log, "a") as log:
                for line in process.stdout or ():
                    log.write(line)
                    current += [part for text, part in command.then.items() if text in line]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        status = process.wait()
        watcher.join()
        if status:
            raise RuntimeError(f"{command.name} ended with {status}; read {self.log}")

    def _watch(self, process: subprocess.Popen[str], current: list[str]) -> None:
        while process.poll() is None:
            self.peaks.setdefault(current[-1], Peak()).look(process.pid)
            time.sleep(SECONDS_BETWEEN)


def write_raw(arguments: argparse.Namespace, raw: Path) -> None:
    """Write the dataset of the domain shift study, with fewer images."""
    WRITERS[arguments.dataset](arguments.data, raw, LABELLED, SIDE)
    for folder, count in (("imagesUn", UNLABELLED), ("imagesTs", TESTED)):
        files = sorted((raw / folder).iterdir())
        kept = {files[place * len(files) // count] for place in range(count)}
        for file in set(files) - kept:
            file.unlink()


def environment_of(arguments: argparse.Namespace) -> dict[str, str]:
    """nnU-Net's folders and switches."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    folders = {f"nnUNet_{name}": str(arguments.work / name) for name in ("raw", "preprocessed", "results")}
    return {
        **os.environ, **folders, "PATH": path, "OMP_NUM_THREADS": str(arguments.threads), "nnUNet_def_n_proc": "2",
        "nnUNet_n_proc_DA": str(arguments.workers), "nnUNet_compile": "f", "nnUNet_extTrainer": str(trainers_path()),
        "nnUNet_cfcl_config": str(arguments.work / "settings.json"), "PYTHONUNBUFFERED": "1",
    }


def commands_of(arguments: argparse.Namespace, dataset: str, configuration: str) -> Iterator[Command]:
    """List all commands in their usual order."""
    work, number = arguments.work, dataset[7:10]
    which = ("-d", number, "-c", configuration)
    fold = (*which, "-f", "0", "-device", "cpu")
    folder = work / "results" / dataset / f"{TRAINER}__nnUNetPlans__{configuration}" / "fold_0"
    images, predicted = work / "raw" / dataset / "imagesTs", work / "predicted"
    predict = ("-i", str(images), "-npp", "1", "-nps", "1", *fold, "-tr", TRAINER)
    plan = "nnUNetv2_plan_and_preprocess"
    yield Command(plan, (plan, *which, "-np", "2", "--no_pbar"))
    yield Command("nnunet_cfcl pool", ("nnunet_cfcl", "pool", *which, "-np", "2"))
    for what in ("train", "report", "generate"):
        yield Command(f"nnunet_cfcl generator {what}", ("nnunet_cfcl", "generator", what, *fold))
    train = ("nnUNetv2_train", number, configuration, "0", "-device", "cpu", "-tr", TRAINER)
    yield Command("nnUNetv2_train, phase 1", train, {
        "Phase 1 done": "nnUNetv2_train, phase 2", "Training done": "nnUNetv2_train, validation and colour space"})
    yield Command("nnUNetv2_predict", ("nnUNetv2_predict", "-o", str(work / "stock"), *predict))
    yield Command("nnunet_cfcl predict --chromap",
                  ("nnunet_cfcl", "predict", "--chromap", "-o", str(predicted), *predict))
    truth = str(images.parent / "labelsTs")
    yield Command("nnunet_cfcl evaluate", (
        "nnunet_cfcl", "evaluate", "-p", str(predicted), "-g", truth, "-o", str(work / "evaluation")))
    yield Command("nnunet_cfcl probe", ("nnunet_cfcl", "probe", *fold, "-tr", TRAINER))
    yield Command("nnunet_cfcl report", ("nnunet_cfcl", "report", str(folder), "-device", "cpu"))


def table(peaks: Mapping[str, Peak]) -> str:
    """Markdown."""
    rows = [f"| `{name}` | {PROMISED[name]} | {peak.together:.0f} | {peak.largest:.0f} |"
            for name, peak in peaks.items()]
    head = "| command | limit, MiB | all processes, MiB | largest process, MiB |"
    return "\n".join([head, "|---|---|---|---|", *rows]) + "\n"


def write(arguments: argparse.Namespace, peaks: Mapping[str, Peak]) -> None:
    """Write both files, after every command, so that a stopped run leaves its results."""
    found = {
        "dataset": arguments.dataset, "configuration": DATASETS[arguments.dataset][1], "threads": arguments.threads,
        "workers": arguments.workers, "promised_mib": PROMISED,
        "peak_mib": {command: vars(peak) for command, peak in peaks.items()}}
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"peak_memory_{arguments.dataset}"
    write_text_atomically(arguments.out / f"{name}.json", json.dumps(found, indent=2) + "\n")
    write_text_atomically(arguments.out / f"{name}.md", table(peaks))


def main() -> None:
    """Measure, write, compare."""
    arguments = parse_arguments()
    dataset, configuration = DATASETS[arguments.dataset]
    arguments.work = arguments.work.resolve()
    shutil.rmtree(arguments.work, ignore_errors=True)
    for name in ("raw", "preprocessed", "results"):
        (arguments.work / name).mkdir(parents=True)
    (arguments.work / "settings.json").write_text(json.dumps(SETTINGS))
    write_raw(arguments, arguments.work / "raw" / dataset)
    measured = Measured(arguments.work / "log.txt", environment_of(arguments))
    for command in commands_of(arguments, dataset, configuration):
        measured.run(command)
        write(arguments, measured.peaks)
    print(table(measured.peaks))
    broken = [name for name, limit in PROMISED.items() if measured.peaks[name].together > limit]
    if broken:
        raise SystemExit(f"more memory than documented: {', '.join(broken)}")


if __name__ == "__main__":
    main()
