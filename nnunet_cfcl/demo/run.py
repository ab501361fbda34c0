"""Steps of the demo: a dataset, two trainings with nnU-Net's own commands, their test on two scanners, a picture."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nnunet_cfcl.config import CONFIG_VARIABLE
from nnunet_cfcl.demo.commands import Commands, step
from nnunet_cfcl.demo.data import (
    CASES_OF_OWN_DATA,
    COUNTERFACTUALS,
    GROUP,
    HeldOut,
    check_raw,
    choose_held_out,
    shrink_plan,
    write_phantom,
)
from nnunet_cfcl.demo.picture import draw_demo
from nnunet_cfcl.demo.recipe import PLUGIN, STOCK, VOLUMES, DemoSize, Recipe, plugin, stock, volumes
from nnunet_cfcl.demo.results import read_results
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.installation import trainers_path
from nnunet_cfcl.phantom.dataset import write_phantom_dataset

PLANS = "demoPlans"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
SETTINGS = "settings.json"
# gigabytes; a small target keeps patch and batch of an own dataset feasible on a CPU
MEMORY_TARGET = "2"
VOLUMES_NUMBER = 901


@dataclass(frozen=True)
class Demo:
    """Folders and sizes of a run of the demo.

    Attributes:
        out: folder of all results.
        dataset: the raw dataset, within ``out``.
        own: whether it is the user's own.
        device: cpu or cuda.
        size: see `DemoSize`.
    """

    out: Path
    dataset: Path
    own: bool
    device: str
    size: DemoSize

    @property
    def commands(self) -> Commands:
        """Runner of the commands that belong to no model."""
        return Commands(self.out, _environment(self.out))

    def of(self, recipe: Recipe) -> Commands:
        """Runner of the commands of a model, with its settings."""
        file = self.out / (SETTINGS if recipe.name == PLUGIN else f"settings_{recipe.name}.json")
        file.write_text(json.dumps(recipe.settings, indent=2))
        return Commands(self.out, {**self.commands.environment, CONFIG_VARIABLE: str(file.resolve())}, recipe.name)

    @property
    def number(self) -> str:
        """Number of the dataset."""
        return self.dataset.name[7:10]

    @property
    def plans(self) -> Path:
        """File of nnU-Net's plan."""
        return self.out / "nnUNet_preprocessed" / self.dataset.name / f"{PLANS}.json"

    def train(self, recipe: Recipe, number: str, configuration: str, fold: str) -> float:
        """Train a model; returns the seconds it took."""
        # batches are made in the training's own process: one core for each of two trainings
        variables = {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"} if self.device == "cpu" else {}
        title = f"{recipe.name}: training (nnUNetv2_train {number} {configuration} {fold} -tr {recipe.trainer})"
        with step(title):
            return self.of(recipe).run("nnUNetv2_train", number, configuration, fold, "-tr", recipe.trainer, "-p",
                                       PLANS, "-device", self.device, **variables)

    def predict(self, recipe: Recipe, configuration: str, held_out: HeldOut) -> None:
        """Predict the test images, with CHRO-maps of the plugin's model."""
        variables = {"nnUNet_cfcl_chromap": "1"} if recipe.name == PLUGIN else {}
        with step(f"{recipe.name}: prediction (nnUNetv2_predict)"):
            self.of(recipe).run(
                "nnUNetv2_predict", "-i", str(held_out.images), "-o", str(self.out / "predictions" / recipe.name), "-d",
                self.number, "-f", held_out.fold, "-c", configuration, "-tr", recipe.trainer, "-p", PLANS, "-device",
                self.device, "-npp", "1", "-nps", "1", **variables)


def run_demo(out: Path, raw: Path | None, device: str, size: DemoSize | None = None) -> Path:
    """Run all steps of the demo.

    Args:
        out: folder of all results; those of an earlier demo are replaced.
        raw: raw dataset, which is only read; None: synthetic patients of two scanners.
        device: cpu or cuda.
        size: numbers of patients and steps; None: those of the documentation.

    Returns:
        The picture of the results.

    Raises:
        UserError: ``raw`` is not a raw dataset, ``out`` is a folder of other content, or a command failed.
    """
    size = size or DemoSize()
    demo = Demo(out, _prepare(out, raw, size), raw is not None, device, size)
    configuration, *others = _plan(demo)
    held_out = choose_held_out(demo.dataset, demo.plans.parent, out, CASES_OF_OWN_DATA if demo.own else None)
    recipes = stock(size), plugin(size, _preprocess_unlabelled(demo, configuration), not demo.own)
    in_3d = volumes(size) if not demo.own or "3d_fullres" in others else None
    seconds: dict[str, float] = {}

    def train(recipe: Recipe) -> None:
        seconds[recipe.name] = demo.train(recipe, demo.number, configuration, held_out.fold)
        demo.predict(recipe, configuration, held_out)

    def train_stock() -> None:
        train(recipes[0])
        if in_3d:
            seconds[VOLUMES] = _train_in_3d(demo, in_3d, held_out.fold)

    _together([train_stock, lambda: train(recipes[1])])
    _evaluate(demo, held_out)
    results = read_results(out, demo.dataset, demo.own, held_out, recipes, in_3d, seconds)
    with step("plotting"):
        draw_demo(results, out / "demo.png")
    for group, name in ((group, name) for group in results.cases for name in results.dice):
        print(f"    {f'scanner {group}' if group else 'test cases'}, {name}: Dice {results.dice[name][group]:.3f}")
    return out / "demo.png"


def _prepare(out: Path, raw: Path | None, size: DemoSize) -> Path:
    """Create the folders of the demo, with the raw dataset."""
    if raw is not None:
        check_raw(raw)
    if out.exists() and any(out.iterdir()) and not (out / SETTINGS).exists():
        raise UserError(f"{out} has content that is not of a demo, expected a new folder or that of an earlier demo",
                        "name another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    for name in FOLDERS:
        (out / name).mkdir(parents=True)
    # marks the folder as a demo's; the plugin's training replaces it
    (out / SETTINGS).write_text("{}")
    if raw is not None:
        dataset = out / "nnUNet_raw" / raw.resolve().name
        dataset.symlink_to(raw.resolve(), target_is_directory=True)
        return dataset
    with step("synthetic patients of scanners A and B"):
        return write_phantom(out / "nnUNet_raw", size)


def _environment(out: Path) -> dict[str, str]:
    # two trainings at a time: threads that wait for each other must not keep a core busy
    defaults = {"nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "2", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    given = dict(os.environ)
    if given.get("nnUNet_n_proc_DA") == "0":  # nnU-Net's planner fails with 0
        del given["nnUNet_n_proc_DA"]
    return {
        **defaults, **given, **{name: str((out / name).resolve()) for name in FOLDERS},
        "nnUNet_extTrainer": str(trainers_path()),
        # progress lines must arrive through the pipe at once
        "PYTHONUNBUFFERED": "1",
    }


def _plan(demo: Demo) -> list[str]:
    """Plan and preprocess; returns the planned configurations, first that of the comparison."""
    wanted = ("2d", "3d_fullres") if demo.own else ("2d",)
    with step(f"planning and preprocessing (nnUNetv2_plan_and_preprocess -d {demo.number})"):
        _plan_and_preprocess(demo, demo.number, *wanted)
    if not demo.own:
        shrink_plan(demo.plans, demo.size)
    known = json.loads(demo.plans.read_text())["configurations"]
    return [configuration for configuration in wanted if configuration in known]


def _plan_and_preprocess(demo: Demo, number: str, *configurations: str) -> None:
    demo.commands.run("nnUNetv2_plan_and_preprocess", "-d", number, "-gpu_memory_target", MEMORY_TARGET,
                      "-overwrite_plans_name", PLANS, "-c", *configurations, "-np", "2", "-npfp", "2", "--no_pbar")


def _preprocess_unlabelled(demo: Demo, configuration: str) -> bool:
    """Preprocess the pool, and the phantom's counterfactuals; returns whether there is a pool."""
    if not (demo.dataset / "imagesUn").is_dir():
        return False
    where = ("-d", demo.number, "-c", configuration, "-p", PLANS, "-np", "1")
    with step("unlabelled images (nnunet_cfcl pool)"):
        demo.commands.run("nnunet_cfcl", "pool", *where)
    if not demo.own:
        with step("true counterfactuals of the phantom (nnunet_cfcl counterfactuals import)"):
            images = str(demo.dataset / COUNTERFACTUALS)
            demo.commands.run("nnunet_cfcl", "counterfactuals", "import", "-i", images, *where)
    return True


def _train_in_3d(demo: Demo, recipe: Recipe, fold: str) -> float:
    """Train for a few steps in 3D: a phantom of its own, or the same dataset; returns the seconds it took."""
    if demo.own:
        return demo.train(recipe, demo.number, "3d_fullres", fold)
    number = str(VOLUMES_NUMBER)
    with step(f"{recipe.name}: volumes (nnunet_cfcl phantom, nnUNetv2_plan_and_preprocess -d {number})"):
        write_phantom_dataset(demo.out / "nnUNet_raw", VOLUMES_NUMBER, "Phantom3D", 3, 6, 0, 0, demo.size.volume,
                              progress=False)
        _plan_and_preprocess(demo, number, "3d_fullres")
    return demo.train(recipe, number, "3d_fullres", "all")


def _together(lanes: Sequence[Callable[[], None]]) -> None:
    """Run lanes side by side; the first error is raised when all have ended."""
    with ThreadPoolExecutor(len(lanes)) as pool:
        for lane in [pool.submit(lane) for lane in lanes]:
            lane.result()


def _evaluate(demo: Demo, held_out: HeldOut) -> None:
    grouped = ("--attributes", str(demo.dataset / "attributes.csv"), "--by", GROUP) if held_out.labelled else ()
    masks = [f"{name}={demo.out / 'predictions' / name}" for name in (STOCK, PLUGIN)]
    with step("evaluation (nnunet_cfcl evaluate)"):
        demo.commands.run("nnunet_cfcl", "evaluate", "-p", masks[0], "--against", masks[1], "-g", str(held_out.labels),
                          "-o", str(demo.out / "evaluation"), "-np", "1", *grouped)
