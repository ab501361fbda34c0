"""The table of trainers matches the classes."""

import pytest

from nnunet_cfcl import trainers
from nnunet_cfcl.cli import main
from nnunet_cfcl.cli.trainers import trainer_table
from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.trainers.lookup import plugin_trainers

PRETRAINED = [name for name in plugin_trainers() if hasattr(getattr(trainers, name), "method")]


def test_every_trainer_has_one_row():
    rows = [line.split("|")[1].strip(" `") for line in trainer_table().splitlines()[2:]]
    assert rows == list(plugin_trainers()) and len(rows) == 14


def test_the_verb_prints_the_table(capsys):
    assert main(["trainers"]) == 0
    assert capsys.readouterr().out.strip() == trainer_table()


@pytest.mark.parametrize("name", PRETRAINED)
def test_the_papers_preset_replaces_the_views_alone(name):
    method = getattr(trainers, name).method
    own = resolve_settings({"views": {"rotation_deg": 5.0, "blur_probability": 0.0}, "pretrain": {"epochs": 3}})
    assert method.adapt(own) == own
    paper = method.adapt(resolve_settings({**own.to_dict(), "preset": "paper"}))
    assert paper.views.blur_probability == 0.5 and paper.pretrain.epochs == 3
    expected = {"VADeR": (0.0, (0.08, 1.0)), "SSDCL": (0.0, (1.0, 1.0))}
    assert (paper.views.rotation_deg, paper.views.crop_fraction) == expected.get(method.name, (15.0, (0.08, 1.0)))
