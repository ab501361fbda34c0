"""Effect of pretraining on another scanner: arms x seeds x label budgets, resumable, with nnU-Net's own commands.

Every run is one `nnUNetv2_train`, `nnUNetv2_predict` and `nnunet_cfcl evaluate` with its own settings, on fold "all"
(all labelled cases, without validation cases for model selection), evaluated after the last epoch, without mirroring in
prediction. Runs of one seed have the same initial weights and, without data loading processes, the same batches in
fine-tuning (except runs with replaced images, which need more random draws). Repeat a stopped command, or one that
stopped after --minutes, to resume it.

Arms with a generator share one generator, and arms with silver labels share these labels: the std over seeds does not
include their variation, nor the duration of a run their training. Interventions that fail the gate are left out and not
replaced by acquisition effects.

    python benchmarks/domain_shift/study.py --preset nano --dataset chest_xrays --work study
    python benchmarks/domain_shift/results.py --work study --preset nano --dataset chest_xrays --out docs/results

    WORK/PRESET_DATASET/raw, preprocessed         one dataset per label budget, with a plan called studyPlans
    WORK/PRESET_DATASET/runs/ARM_LABELS_SEED/     run.json (everything that determines it, with a hash), settings.json,
                                                  the trainer's own folder, log.txt, predictions, evaluation
    WORK/PRESET_DATASET/generator_LABELS.log      training and gate of the generator, for arms that need one
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import ARMS, Arm
from presets import PRESETS, Preset
from study_data import DATASETS, StudyDataset

import nnunet_cfcl
from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.runs.lock import exclusive

PLANS = "studyPlans"
#: Seed of the model that labels the pool, and of the generator; no run uses it.
TEACHER_SEED = 1000


class OutOfTime(Exception):
    """The time limit of --minutes is reached; finished work is kept."""


@dataclass(frozen=True)
class Study:
    """Study of one dataset with one preset.

    Attributes:
        dataset: see `study_data`.
        preset: see `presets`.
        data: source of the images.
        root: folder of the study's files.
        device: cpu or cuda.
        threads: number of threads of every process.
        deadline: time.time() at which to stop.
        changes: dotted settings that change every arm, for choices on the development half.
    """

    dataset: StudyDataset
    preset: Preset
    data: Path
    root: Path
    device: str
    threads: int
    deadline: float
    changes: Mapping[str, Any]

    def environment(self, settings: Path | None = None, results: Path | None = None) -> dict[str, str]:
        """Variables of nnU-Net's commands."""
        from nnunet_cfcl.nnunet.installation import trainers_path

        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"nnUNet_raw": self.root / "raw", "nnUNet_preprocessed": self.root / "preprocessed",
               "nnUNet_results": results or self.root / "results", "nnUNet_extTrainer": trainers_path(),
               "OMP_NUM_THREADS": self.threads, "nnUNet_n_proc_DA": self.preset.workers, "nnUNet_def_n_proc": 1,
               **({"nnUNet_cfcl_config": settings} if settings else {})}
        if self.device == "cpu":
            own["nnUNet_compile"] = "f"
        # settings of the user for other trainings
        inherited = {key: value for key, value in os.environ.items()
                     if key not in ("nnUNet_cfcl_config", "nnUNet_wandb_enabled")}
        return {**inherited, "PATH": path, **{key: str(value) for key, value in own.items()}}

    def settings(self, own: Mapping[str, Any], generator: bool) -> dict[str, Any]:
        """Merge the nested settings of the preset and the generator with the dotted changes and ``own``."""
        parts = {**self.preset.settings, **({"generator": self.preset.generator} if generator else {})}
        settings: dict[str, Any] = json.loads(json.dumps(parts))
        for key, value in {**self.changes, **own}.items():
            section, _, name = key.rpartition(".")
            (settings.setdefault(section, {}) if section else settings)[name] = value
        return settings

    def plan(self, budget: int) -> dict[str, Any]:
        """nnU-Net's, of the configuration."""
        file = self.root / "preprocessed" / self.dataset.folder(budget) / f"{PLANS}.json"
        plan: dict[str, Any] = json.loads(file.read_text())["configurations"][self.dataset.configuration]
        return plan

    def call(self, log: Path, environment: Mapping[str, str], *command: str) -> None:
        """Run a command until the deadline, with its output in a log file.

        Raises:
            OutOfTime: the command was stopped at the deadline.
            RuntimeError: the command failed; the message has the log file.
        """
        with open(log, "a") as file:
            file.write(f"\n$ {' '.join(command)}\n")
            file.flush()
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                       start_new_session=True)
            try:
                status = process.wait(max(0.0, self.deadline - time.time()))
            except BaseException as stopped:
                # with its data loading processes
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if isinstance(stopped, subprocess.TimeoutExpired):
                    raise OutOfTime from stopped
                raise
        if status:
            raise RuntimeError(f"{command[0]} ended with {status}; read {log}")


@dataclass(frozen=True)
class Run:
    """Run of the study.

    Attributes:
        study: study of the run.
        name: name of the arm.
        arm: see `arms`.
        budget: number of labelled cases.
        seed: seed of all random draws.
    """

    study: Study
    name: str
    arm: Arm
    budget: int
    seed: int

    @property
    def folder(self) -> Path:
        """Of all its files."""
        return self.study.root / "runs" / f"{self.name}_{self.budget}_{self.seed}"

    @property
    def fold(self) -> Path:
        """nnU-Net's folder of the training."""
        study = self.study
        model = f"{self.arm.trainer}__{PLANS}__{study.dataset.configuration}"
        return self.folder / "results" / study.dataset.folder(self.budget) / model / "fold_all"

    def settings(self) -> dict[str, Any]:
        """Nested settings of the plugin from preset, arm and seed."""
        settings = self.study.settings({**self.arm.settings, "seed": self.seed}, self.arm.needs_generator)
        settings["finetune"]["epochs"] *= self.arm.times
        if self.arm.longer:
            settings["finetune"]["epochs"] += self._pretraining_in_epochs(settings)
        return settings

    def _pretraining_in_epochs(self, settings: Mapping[str, Any]) -> int:
        """Number of fine-tuning epochs that process as many patches as the pretraining of the other arms."""
        pretraining, finetuning = settings["pretrain"], settings["finetune"]
        views = settings["counterfactual"]["count"] + 1
        patches = pretraining["epochs"] * pretraining["iterations_per_epoch"] * pretraining["images_per_step"] * views
        return round(patches / (finetuning["iterations_per_epoch"] * self.study.plan(self.budget)["batch_size"]))

    def identity(self) -> dict[str, Any]:
        """All that decides about the run."""
        study, table = self.study, self._raw / "test.csv"
        generated = {"generated": self._generated()} if self.arm.needs_generator else {}
        return {"arm": self.name, "trainer": self.arm.trainer, "settings": self.settings(),
                "plan": study.plan(self.budget), "labels": self.budget, "seed": self.seed, "device": study.device,
                "workers": study.preset.workers, "version": nnunet_cfcl.__version__, "test": table.read_text(),
                **generated, **({"after": digest(self.before.identity())} if self.arm.after else {})}

    @property
    def before(self) -> Run:
        """The run with whose weights this one begins."""
        return Run(self.study, self.arm.after, ARMS[self.arm.after], self.budget, self.seed)

    def check_identity(self) -> None:
        """Check that the folder belongs to this run.

        Raises:
            RuntimeError: the folder has a run with other settings.
        """
        file = self.folder / "run.json"
        if file.exists() and json.loads(file.read_text())["hash"] != digest(self.identity()):
            raise RuntimeError(f"{self.folder} holds a run with other settings: name another --work, or delete it")

    def finished(self) -> bool:
        """Whether its evaluation is there."""
        return (self.folder / "evaluation" / "metrics.csv").exists()

    def work(self) -> None:
        """Train, predict and evaluate, as far as not done yet.

        Raises:
            OutOfTime: see `Study.call`.
            RuntimeError: a command failed, or the folder belongs to a run with other settings.
        """
        self._check_prepared()
        self.folder.mkdir(parents=True, exist_ok=True)
        identity, file = self.identity(), self.folder / "settings.json"
        write_text_atomically(self.folder / "run.json", json.dumps({**identity, "hash": digest(identity)}, indent=1))
        write_text_atomically(file, json.dumps(self._with_files(identity["settings"]), indent=1))
        environment = self.study.environment(file, self.folder / "results")
        if self.arm.offline:
            environment |= self._label_pool()
        model = ("-tr", self.arm.trainer, "-p", PLANS, "-device", self.study.device)
        self._take_pretraining()
        self._train(environment, model)
        self._predict(environment, model, self._raw / "imagesTs", self.folder / "predictions")
        self.study.call(
            self.folder / "log.txt", environment, "nnunet_cfcl", "evaluate", "-p", str(self.folder / "predictions"),
            "-g", str(self._raw / "labelsTs"), "--attributes", str(self._raw / "test.csv"), "--by",
            *self.study.dataset.groups, "-o", str(self.folder / "evaluation"), "-np", "1")

    def _with_files(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Add what exists already: the weights to begin with, the generator's counterfactuals, common to all runs."""
        if self.arm.after:
            start = str(self.before.fold / "checkpoint_final.pth")
            settings = {**settings, "teacher": {**settings["teacher"], "start_from": start}}
        if not self.arm.needs_generator:
            return settings
        store = {"source": "precomputed", "store": str(self.study.root / self._generated()["store"])}
        return {**settings, "counterfactual": {**settings["counterfactual"], **store}}

    def _generated(self) -> dict[str, Any]:
        """Read the record of the generator's counterfactuals; empty where they do not exist yet."""
        file = generated_file(self.study, self.budget)
        record: dict[str, Any] = json.loads(file.read_text()) if self.arm.needs_generator and file.exists() else {}
        return record

    def has_no_generator(self) -> bool:
        """Whether no change of the scanner passed the generator's gate."""
        record = self._generated()
        return bool(record) and not any("scanner" in name.split("+") for name in record["interventions"])

    def _label_pool(self) -> dict[str, str]:
        """Let the model of ``after`` label the pool, and make a dataset of it together with the labelled images.

        Returns:
            nnU-Net's folders of this dataset.
        """
        own, name, ending = self.folder / "dataset", self.study.dataset.folder(self.budget), self._ending
        folders = {f"nnUNet_{part}": str(own / part) for part in ("raw", "preprocessed")}
        raw, preprocessed = (own / part / name for part in ("raw", "preprocessed"))
        if (own / "done").exists():
            return folders
        labels = self.folder / "pool"
        before = self.before
        environment = self.study.environment(before.folder / "settings.json", before.folder / "results")
        before._predict(environment, ("-tr", before.arm.trainer, "-p", PLANS, "-device", self.study.device),
                        self._raw / "imagesUn", labels)
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(self._raw / "imagesTr", raw / "imagesTr")
        shutil.copytree(self._raw / "labelsTr", raw / "labelsTr")
        shutil.copytree(self._raw / "imagesUn", raw / "imagesTr", dirs_exist_ok=True)
        for file in labels.glob(f"*{ending}"):
            shutil.copy(file, raw / "labelsTr")
        description = json.loads((self._raw / "dataset.json").read_text())
        description["numTraining"] = len(list((raw / "labelsTr").iterdir()))
        (raw / "dataset.json").write_text(json.dumps(description))
        shutil.copy(self._raw / "attributes.csv", raw)
        preprocessed.mkdir(parents=True)
        for file in (f"{PLANS}.json", "dataset_fingerprint.json"):
            shutil.copy(self.study.root / "preprocessed" / name / file, preprocessed)
        (preprocessed / "dataset.json").write_text(json.dumps(description))
        self.study.call(self.folder / "log.txt", {**self.study.environment(), **folders, "nnUNet_n_proc_DA": "1"},
                        "nnUNetv2_preprocess", "-d", name[7:10], "-c", self.study.dataset.configuration, "-plans_name",
                        PLANS, "-np", "1")
        (own / "done").touch()
        return folders

    @property
    def _ending(self) -> str:
        ending: str = json.loads((self._raw / "dataset.json").read_text())["file_ending"]
        return ending

    def label(self, images: Path, target: Path) -> None:
        """Predict other images, with probabilities, after the training."""
        environment = self.study.environment(self.folder / "settings.json", self.folder / "results")
        model = ("-tr", self.arm.trainer, "-p", PLANS, "-device", self.study.device, "--save_probabilities")
        self._predict(environment, model, images, target)

    @property
    def _raw(self) -> Path:
        return self.study.root / "raw" / self.study.dataset.folder(self.budget)

    @property
    def _where(self) -> tuple[str, str, str]:
        dataset = self.study.dataset
        return dataset.folder(self.budget)[7:10], dataset.configuration, "all"

    def _take_pretraining(self) -> None:
        """Reuse the pretraining of the arm in ``like``; the trainer pretrains anew where the hash differs."""
        own = self.fold / "cfcl" / "pretraining"
        if not self.arm.like or own.exists():
            return
        alike = Run(self.study, self.arm.like, ARMS[self.arm.like], self.budget, self.seed)
        other = alike.fold / "cfcl" / "pretraining"
        if (other / "checkpoint_final.pth").exists():
            partial = own.with_name(f".{own.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(other, partial)
            partial.rename(own)

    def _train(self, environment: Mapping[str, str], model: tuple[str, ...]) -> None:
        if (self.fold / "checkpoint_final.pth").exists():
            return
        begun = (self.fold / "checkpoint_latest.pth", self.fold / "cfcl" / "pretraining" / "checkpoint_latest.pth",
                 self.fold / "cfcl" / "pretraining" / "checkpoint_final.pth")
        goes_on = ["--c"] if any(file.exists() for file in begun) else []
        started = time.time()
        try:
            self.study.call(self.folder / "log.txt", environment, "nnUNetv2_train", *self._where, *model, *goes_on)
        finally:
            with open(self.folder / "seconds.txt", "a") as file:
                file.write(f"{time.time() - started:.1f}\n")

    def _predict(self, environment: Mapping[str, str], model: tuple[str, ...], images: Path, target: Path) -> None:
        if target.exists():
            return
        # nnU-Net skips existing masks, even one truncated by a kill
        partial, (dataset, configuration, fold) = target.with_name(f".{target.name}.partial"), self._where
        shutil.rmtree(partial, ignore_errors=True)
        self.study.call(
            self.folder / "log.txt", environment, "nnUNetv2_predict", "-i", str(images), "-o", str(partial), "-d",
            dataset, "-c", configuration, "-f", fold, "-npp", "1", "-nps", "1", "--disable_tta",
            "--disable_progress_bar", *model)
        partial.rename(target)

    def _check_prepared(self) -> None:
        """Check for silver labels, without which the trainers use the manual labels and only log it."""
        root = self.study.root
        needed = {
            "silver labels": (self.arm.silver, root / f"silver_{self.budget}.done"),
            "generator's counterfactuals": (self.arm.needs_generator, generated_file(self.study, self.budget)),
            "model to begin with": (bool(self.arm.after),
                                    self.before.fold / "checkpoint_final.pth" if self.arm.after else root),
            "true counterfactuals": (self.arm.settings.get("counterfactual.source") == "precomputed",
                                     root / f"counterfactuals_{self.budget}.done")}
        for what, (needs, file) in needed.items():
            if needs and not file.exists():
                raise RuntimeError(f"{self.name} needs the {what} of {self.budget} labels, which --part 0 makes: wait "
                                   "for it, and give all parts the same --arms")


def prepare(study: Study, budget: int) -> None:
    """Write, plan and preprocess dataset and pool of a label budget, as far as not done yet."""
    study.root.mkdir(parents=True, exist_ok=True)
    folder, log = study.dataset.folder(budget), study.root / "prepare.log"
    raw, preprocessed = study.root / "raw" / folder, study.root / "preprocessed" / folder
    if not (raw / "dataset.json").exists():
        shutil.rmtree(raw, ignore_errors=True)
        study.dataset.write(study.data, raw, budget, study.preset.image_size)
    # nnU-Net's planner uses this number as its thread count and fails with 0
    environment = {**study.environment(), "nnUNet_n_proc_DA": "1"}
    command = (folder[7:10], "-c", study.dataset.configuration)
    if not (preprocessed / f"{PLANS}.json").exists():
        spacing = [f"{study.preset.spacing:g}"] * 3
        # nnU-Net requires another plans name for a given spacing; the study's plan replaces it anyway
        resampled = ["-overwrite_target_spacing", *spacing, "-overwrite_plans_name", "nnUNetPlans"]
        study.call(log, environment, "nnUNetv2_plan_and_preprocess", "-d", *command, "-np", "1", "-npfp", "1",
                   "--no_pbar", *(resampled if study.preset.spacing else ()))
        _write_plan(preprocessed, study.preset)
    preprocess(study, budget, "pool")


def preprocess(study: Study, budget: int, *verb: str) -> None:
    """Run a command of the plugin that preprocesses images with the study's plan."""
    environment = {**study.environment(), "nnUNet_n_proc_DA": "1"}
    study.call(study.root / "prepare.log", environment, "nnunet_cfcl", *verb, "-d", study.dataset.folder(budget)[7:10],
               "-c", study.dataset.configuration, "-p", PLANS, "-np", "1")


def _write_plan(preprocessed: Path, preset: Preset) -> None:
    """Change nnU-Net's plan to the preset's network and batch size."""
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    plans["plans_name"] = PLANS
    for configuration in plans["configurations"].values():
        network = configuration.get("architecture", {}).get("arch_kwargs")
        if network and preset.stages:
            count = network["n_stages"] = min(preset.stages, network["n_stages"])
            for key in ("kernel_sizes", "strides", "n_conv_per_stage"):
                network[key] = network[key][:count]
            network["n_conv_per_stage_decoder"] = network["n_conv_per_stage_decoder"][: count - 1]
            network["features_per_stage"] = [preset.features * 2**stage for stage in range(count)]
        if network and preset.batch_size:
            configuration["batch_size"] = preset.batch_size
    write_text_atomically(preprocessed / f"{PLANS}.json", json.dumps(plans, indent=1))


def make_silver(study: Study, budget: int) -> None:
    """Label the pool with nnU-Net, trained on the labelled cases with a seed that no run uses."""
    raw = study.root / "raw" / study.dataset.folder(budget)
    done = study.root / f"silver_{budget}.done"
    if done.exists():
        return
    teacher = Run(study, "Teacher", ARMS["Scratch"], budget, TEACHER_SEED)
    teacher.work()
    teacher.label(raw / "imagesUn", raw / "labelsSilver")
    for name in ("dataset.json", "plans.json", "predict_from_raw_data_args.json"):
        (raw / "labelsSilver" / name).unlink(missing_ok=True)
    preprocess(study, budget, "pool")
    done.touch()


def import_counterfactuals(study: Study, budget: int) -> None:
    """Import the phantom's true counterfactuals, where the dataset has them."""
    images = study.root / "raw" / study.dataset.folder(budget) / "counterfactuals"
    done = study.root / f"counterfactuals_{budget}.done"
    if images.is_dir() and not done.exists():
        preprocess(study, budget, "counterfactuals", "import", "-i", str(images))
        done.touch()


def make_generated(study: Study, budget: int) -> None:
    """Generate counterfactuals of the labelled cases and the pool, with one generator and a seed that no run uses.

    The result is recorded in `generated_file`.

    Raises:
        RuntimeError: they were generated before, with other settings.
    """
    settings = study.root / f"generator_{budget}.json"
    own = study.settings({"counterfactual.source": "generator", "seed": TEACHER_SEED}, generator=True)
    decides = digest({"settings": own, "plan": study.plan(budget), "version": nnunet_cfcl.__version__})
    file = generated_file(study, budget)
    if file.exists():
        if json.loads(file.read_text())["hash"] != decides:
            raise RuntimeError(f"{file} tells of a generator with other settings: name another --work, or delete it "
                               "and the runs of the arms with a generator")
        return
    write_text_atomically(settings, json.dumps(own, indent=1))
    log = generator_log(study, budget)
    study.call(log, study.environment(settings), "nnunet_cfcl", "generator", "generate", "-d",
               study.dataset.folder(budget)[7:10], "-c", study.dataset.configuration, "-f", "all", "-p", PLANS,
               "-device", study.device)
    made = re.findall(r"^The counterfactuals are in (.+)$", log.read_text().rpartition("\n$ ")[2], re.MULTILINE)
    told: dict[str, Any] = {"hash": decides, "store": None, "source": None, "interventions": []}
    if made:
        from nnunet_cfcl.counterfactual.store import CounterfactualStore

        store = CounterfactualStore.open(made[-1])
        told |= {"store": os.path.relpath(made[-1], study.root), "source": store.source,
                 "interventions": list(store.interventions)}
    write_text_atomically(file, json.dumps(told, indent=1))


def generated_file(study: Study, budget: int) -> Path:
    """Collect store, generator, and the interventions that passed the gate."""
    return study.root / f"generated_{budget}.json"


def generator_log(study: Study, budget: int) -> Path:
    """How it was trained and judged."""
    return study.root / f"generator_{budget}.log"


def runs_of(study: Study, arms: list[str], budgets: list[int], seeds: list[int]) -> Iterator[Run]:
    """List the runs in order, all arms of a seed together, so that an unfinished study is readable."""
    for budget in budgets:
        for seed in seeds:
            for name in arms:
                yield Run(study, name, ARMS[name], budget, seed)


def work_on(study: Study, runs: list[Run], part: int, parts: int) -> None:
    """Execute every ``parts``-th run."""
    from tqdm import tqdm

    mine = [run for number, run in enumerate(runs) if number % parts == part]
    left_out = [run for run in mine if run.has_no_generator()]
    for run in left_out:
        print(f"Left out: {run.folder.name}, for the gate let no change of the scanner pass; see "
              f"{generator_log(run.study, run.budget)}")
        mine.remove(run)
    for run in mine:
        run.check_identity()
    for run in tqdm(mine, desc="runs", unit="run"):
        with exclusive(run.folder, print):
            if not run.finished():
                run.work()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted({preset for preset, _ in PRESETS}), default="nano")
    parser.add_argument("--dataset", choices=tuple(DATASETS), default="chest_xrays")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CFCL_TEST_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, required=True, help="folder of all files; kept, and gone on with")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), metavar="ARM", help="default: the preset's; "
                        + ", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the preset's")
    parser.add_argument("--labels", nargs="+", type=int, help="label budgets; default: the preset's")
    parser.add_argument("--changes", type=json.loads, default={}, metavar="JSON",
                        help="dotted settings, changed in every arm; give such a study a --work of its own")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="of every process (default: %(default)s)")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("K", "N"),
                        help="do only every N-th run, beginning with the K-th; parts can be worked on at the same "
                        "time, once part 0 has prepared the data")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long; the same command goes on")
    return parser.parse_args()


def main() -> None:
    """Prepare the study, then execute the unfinished runs."""
    arguments = parse_arguments()
    preset = PRESETS[arguments.preset, arguments.dataset]
    root = (arguments.work / f"{arguments.preset}_{arguments.dataset}").resolve()
    study = Study(DATASETS[arguments.dataset], preset, arguments.data.resolve(), root, arguments.device,
                  arguments.threads, time.time() + 60 * arguments.minutes, arguments.changes)
    for one in (signal.SIGTERM, signal.SIGHUP):
        # an exception, so that the running command is stopped too
        signal.signal(one, lambda *_: sys.exit("stopped; the same command goes on from here"))
    arms = list(dict.fromkeys(arguments.arms or preset.arms))
    budgets, seeds = arguments.labels or list(preset.labels), arguments.seeds or list(preset.seeds)
    try:
        for budget in budgets if arguments.part[0] == 0 else ():
            prepare(study, budget)
            import_counterfactuals(study, budget)
            # before the silver labels, so that its gate sees the same data for any choice of arms
            if any(ARMS[name].needs_generator for name in arms):
                make_generated(study, budget)
            if any(ARMS[name].silver for name in arms):
                make_silver(study, budget)
        work_on(study, list(runs_of(study, arms, budgets, seeds)), *arguments.part)
    except OutOfTime:
        print("The time is over; the same command goes on from here.")


if __name__ == "__main__":
    main()
