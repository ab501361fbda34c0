"""Which versions of nnU-Net work: each is installed into an environment of its own and made to do everything once.

    python -m tests.compatibility.matrix [--versions ==2.8.0 ...] [--keep FOLDER]

Writes ``docs/reference/nnunet-versions.json`` and the table of ``docs/reference/compatibility.md``. The environments
share torch and the like with the running one, so that nothing large is fetched; packages whose versions a version of
nnU-Net does not take are replaced in its environment, torch excepted, which the table then says. pip's index is needed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.phantom.dataset import write_phantom_dataset
from tests.compatibility.environments import (
    PIP_INSTALL,
    build,
    checked,
    copy_sources,
    make_environment,
    packages_of,
    pip,
    pip_install,
)
from tests.compatibility.page import VERSIONS_FILE, measured_versions, write_page
from tests.end_to_end.conftest import PLANS, TRAINER, NnUNet, shorten_plans

#: The newest there is, then every release back to the oldest that is supported, then the one before it.
VERSIONS = ("<3", "==2.8.0", "==2.7.0", "==2.6.4", "==2.6.3", "==2.6.2", "==2.6.0", "==2.5.2")
DATASET = "Dataset900_Phantom2D"
CONFIGURATION = ("900", "2d", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")

IMPORT = """
import importlib, pkgutil, nnunet_cfcl
for module in pkgutil.walk_packages(nnunet_cfcl.__path__, "nnunet_cfcl."):
    if module.name != "nnunet_cfcl.__main__":
        importlib.import_module(module.name)
"""
# by the variable, where nnU-Net reads it; else by `install`, which stays for all that follows
LOOK_UP = f"""
import os
from nnunet_cfcl.nnunet import installation, compatibility
if compatibility.reads_external_trainers():
    os.environ["nnUNet_extTrainer"] = str(installation.trainers_path())
    print("by nnUNet_extTrainer")
else:
    installation.install()
    print("by nnunet_cfcl install")
from nnunet_cfcl.trainers.lookup import check_trainer
found = check_trainer({TRAINER!r})
assert found.status == "ok", found.line()
"""
UNMET = """
import importlib.metadata
from packaging.requirements import Requirement
for text in importlib.metadata.requires("nnunetv2"):
    wanted = Requirement(text)
    if wanted.marker is not None and not wanted.marker.evaluate():
        continue
    try:
        is_met = wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        is_met = False
    if not is_met:
        print(text)
"""


@dataclass
class InEnvironment(NnUNet):
    """nnU-Net's folders, and the commands of an environment.

    Args:
        scripts: its ``bin`` folder.
    """

    scripts: Path = Path()

    @property
    def environment(self) -> dict[str, str]:
        usual = super().environment
        return {**usual, "PATH": f"{self.scripts}:{usual['PATH']}", "OMP_NUM_THREADS": "1"}

    def python(self, code: str) -> str:
        """The output of a script."""
        return self.run(str(self.scripts / "python"), "-c", code)


def _find(nnunet: InEnvironment) -> str:
    return nnunet.python(IMPORT + LOOK_UP)


def _preprocess(nnunet: InEnvironment) -> str:
    """A phantom dataset, planned and preprocessed by this nnU-Net's command, its pool by ours."""
    for name in ("raw", "preprocessed", "results"):
        nnunet.folder(name).mkdir()
    write_phantom_dataset(nnunet.folder("raw"), 900, "Phantom2D", dim=2, patients=6, test_patients=2, seed=0,
                          shape=(64, 64), progress=False)
    raw = nnunet.folder("raw") / DATASET
    shutil.copytree(raw / "imagesTs", raw / "imagesUn")
    nnunet.run("nnUNetv2_plan_and_preprocess", "-d", "900", "-c", "2d", "-np", "1", "-npfp", "1")
    shorten_plans(nnunet.folder("preprocessed") / DATASET, batch_2d=2)
    nnunet.settings(pretrain={"epochs": 3}, finetune={"epochs": 1})
    nnunet.variables["nnUNet_n_proc_DA"] = "0"  # from here on: nnU-Net's planner fails with it
    return nnunet.run("nnunet_cfcl", "pool", "-d", "900", "-c", "2d", "-p", PLANS, "-np", "1")


def _doctor(nnunet: InEnvironment) -> str:
    return nnunet.run("nnunet_cfcl", "doctor", "-d", "900", "-c", "2d", "-p", PLANS, "-tr", TRAINER, "-device", "cpu")


def _train(nnunet: InEnvironment) -> str:
    """Killed in phase 1, continued by ``--c``, both phases and nnU-Net's validation."""
    nnunet.run_until("Pretraining epoch 1", "nnUNetv2_train", *CONFIGURATION)
    output = nnunet.run("nnUNetv2_train", *CONFIGURATION, "--c")
    assert "Pretraining resumes after epoch" in output, "--c began phase 1 anew"
    assert "Mean Validation Dice" in output, "no validation"
    return output


def _predict(nnunet: InEnvironment) -> str:
    """Masks and CHRO-maps by nnU-Net's command."""
    masks = nnunet.root / "masks"
    nnunet.variables["nnUNet_cfcl_chromap"] = "1"
    output = nnunet.run(
        "nnUNetv2_predict", "-i", str(nnunet.folder("raw") / DATASET / "imagesTs"), "-o", str(masks), "-d", "900", "-c",
        "2d", "-f", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu", "-npp", "1", "-nps", "1")
    found = {"masks": len(list(masks.glob("*.png"))), "maps": len(list((masks / "chromap").glob("*.png")))}
    assert found == {"masks": 2, "maps": 2}, f"{found}\n{output[-2000:]}"
    return output


#: Column of the table -> what is tried; each needs those before it; the doctor knows what is supported: last.
STEPS: dict[str, Callable[[InEnvironment], str]] = {
    "import, look-up": _find, "preprocessing, pool": _preprocess, "phases 1 and 2, `--c`": _train,
    "prediction, CHRO-maps": _predict, "doctor": _doctor,
}


def try_version(wanted: str, wheel: Path, folder: Path) -> tuple[str, dict[str, object]]:
    """Everything once with one version.

    Args:
        wanted: as in a requirement, "==2.8.0".
        wheel: of nnunet_cfcl.
        folder: a new one for environment and data.

    Returns:
        The version, and what happened: ``steps`` (name -> "ok" or what went wrong) and ``notes``.
    """
    python = make_environment(folder / "environment")
    pip(python, *PIP_INSTALL, "--quiet", f"nnunetv2{wanted}")
    version, = (file.name.removeprefix("nnunetv2-").removesuffix(".dist-info")
                for file in packages_of(python).glob("nnunetv2-*.dist-info"))
    notes = _meet_requirements(python)
    pip_install(python, wheel)
    nnunet = InEnvironment(folder, scripts=python.parent)
    nnunet.variables["nnUNet_extTrainer"] = str(packages_of(python) / "nnunet_cfcl" / "_dropin")
    steps: dict[str, str] = {}
    for name, step in STEPS.items():
        try:
            said = step(nnunet)
            steps[name] = "ok"
            if name == "import, look-up":
                notes.append(said.strip().splitlines()[-1])
        # whatever goes wrong is what the table is to tell
        except Exception as error:
            steps[name] = _reason(str(error))
            notes += _doctors_word(nnunet)
            break
    return version, {"steps": steps, "notes": notes}


def _meet_requirements(python: Path) -> list[str]:
    """Replace what this nnU-Net does not take, but for torch; says what was done."""
    unmet = [line.split(";")[0].strip() for line in checked([python, "-c", UNMET]).splitlines()]
    others = [text for text in unmet if not re.match(r"torch\b", text)]
    if others:
        pip(python, *PIP_INSTALL, "--quiet", *others)
    torch = importlib.metadata.version("torch")
    return [f"torch {torch} though it asks for {text}" for text in unmet if text not in others] + [
        f"with {text}" for text in others]


def _doctors_word(nnunet: InEnvironment) -> list[str]:
    """What the doctor says of this nnU-Net, if it is not supported."""
    said = nnunet.start("nnunet_cfcl", "doctor", "-device", "cpu").communicate(timeout=900)[0]
    return [f"the doctor: {line}" for line in said.splitlines() if line.startswith("FAIL  nnU-Net")][:1]


def _reason(text: str) -> str:
    """The last line that says something of a failure, without folders of this machine."""
    lines = [re.sub(r" \(/[^)]*\)", "", line.strip()) for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "failed"


def main(arguments: Sequence[str] | None = None) -> None:
    """Try the versions, write table and page."""
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility.matrix", description=__doc__)
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="VERSION", help="as ==2.8.0; default: all")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep environments and data there")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        base = chosen.keep or Path(temporary)
        for name in ("sources", "dist"):
            (base / name).mkdir(parents=True)
        wheel = build("wheel", copy_sources(base / "sources"), base / "dist")
        for wanted in tqdm(chosen.versions, desc="versions of nnU-Net"):
            folder = Path(tempfile.mkdtemp(dir=base))
            version, found = try_version(wanted, wheel, folder)
            _remember(version, found)
            tqdm.write(f"{version}: {found}")
            if chosen.keep is None:
                shutil.rmtree(folder)


def _remember(version: str, found: dict[str, object]) -> None:
    """Write it into file and page; what is known of other versions stays."""
    content = {"python": platform.python_version(), "torch": importlib.metadata.version("torch"),
               "versions": {**measured_versions()["versions"], version: found}}
    write_text_atomically(VERSIONS_FILE, json.dumps(content, indent=2) + "\n")
    write_page()


if __name__ == "__main__":
    main()
