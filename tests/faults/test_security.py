"""Files and names that mean harm: nothing in them is run, nothing leaves its folder, the report shows them as text.

docs/explanation/security.md says what is promised, and what nnU-Net itself does not promise.
"""

import ast
import json
import pickle
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnunet_cfcl.chromap.color_space import ColorSpace
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator
from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.data.attribute_table import read_attribute_table
from nnunet_cfcl.data.pool.check import read_probabilities
from nnunet_cfcl.data.pool.find_cases import read_qualities
from nnunet_cfcl.data.pool.manifest import manifest_file, read_manifest
from nnunet_cfcl.errors import UserError, printable
from nnunet_cfcl.evaluation.masks.tables import named_folders
from nnunet_cfcl.evaluation.probe.models import read_weights
from nnunet_cfcl.evaluation.report import sections
from nnunet_cfcl.evaluation.report.blocks import Chapter, Section
from nnunet_cfcl.evaluation.report.fold_folder import read_fold
from nnunet_cfcl.evaluation.report.metrics import metrics_blocks, read_metrics
from nnunet_cfcl.evaluation.report.page import render
from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.files.names import is_safe_filename
from nnunet_cfcl.phases.attributes_of_cases import KnownAttributes, coding_and_interventions
from nnunet_cfcl.runs.checkpoint import load_checkpoint
from nnunet_cfcl.trainers.export_stock import _load
from tests.evaluation.report.fold_folders import Page, write_complete
from tests.evaluation.report.test_report import check_is_harmless
from tests.fuzz.readers import READERS

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("../x", "../../x", "/etc/x", "..", "", "a/b", "a\\b", "..\\x", "C:x", "C:\\x", "\\\\host\\x", "a\0b", "a\nb",
           "a/", "\x1b[2J")

# ---------------------------------------------------------------- what files hold is not run


class WritesAFile:
    """Unpickled, it writes a file."""

    def __init__(self, file):
        self._file = str(file)

    def __reduce__(self):
        return eval, (f"open({self._file!r}, 'w').write('x')",)


READ_CHECKPOINTS = {"pretraining": load_checkpoint, "generator": CounterfactualGenerator.load, "probe": read_weights,
                    "export": _load}
FORMS = ("archive", "old", "pickle")


@pytest.mark.parametrize("kind", READ_CHECKPOINTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_that_would_run_something_is_refused_and_runs_nothing(tmp_path, kind, form):
    marker, file = tmp_path / "ran", tmp_path / "evil.pth"
    content = {"network_weights": {"a": torch.ones(1)}, "generator": WritesAFile(marker), "x": WritesAFile(marker)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "archive")
    with pytest.raises(UserError, match=r"evil\.pth cannot be read as a .* more than tensors, .*run code"):
        READ_CHECKPOINTS[kind](file)
    assert not marker.exists()


def test_the_harmful_checkpoint_would_run_where_it_is_trusted(tmp_path):
    torch.save(WritesAFile(tmp_path / "ran"), tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    evil = np.array([WritesAFile(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "evil.npz", format=evil, weight=evil, probabilities=evil)
    with pytest.raises(UserError, match=r"evil\.npz cannot be read as a colour space"):
        ColorSpace.load(tmp_path / "evil.npz")
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_probabilities(tmp_path / "evil.npz")
    assert not (tmp_path / "ran").exists()


def test_a_small_file_that_becomes_large_is_refused_before_it_does(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", format=1, weight=np.zeros((1000, 10000), np.float32))
    with pytest.raises(UserError, match="compressed"):
        ColorSpace.load(tmp_path / "bomb.npz")


@pytest.mark.parametrize("name", ["LazyArray", "b2o", "proxy-source"])
def test_a_counterfactual_that_holds_an_expression_is_not_opened(tmp_path, name, monkeypatch):
    store = CounterfactualStore.create(tmp_path, ["scanner"], "test")
    blosc2.asarray(np.zeros((1, 1, 2, 2), np.float32), urlpath=str(store.path("case", "scanner")), mode="w",
                   meta={name: 1})
    opened = []
    monkeypatch.setattr(blosc2, "open", lambda **arguments: opened.append(arguments))
    with pytest.raises(UserError, match=f"it holds a {name}, no plain array"):
        store.read("case", "scanner")
    assert not opened


#: (file, what) -> why it may.
ALLOWED = {
    ("nnunet_cfcl/runs/checkpoint.py", "import pickle"): "the type of the error that torch.load raises, nothing more",
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "xml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load", "yaml.load",
                   "pandas.read_pickle", "load_pickle", "pickle.load", "pickle.loads"}


def _dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def dangers(source):
    """What of a module's syntax tree could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            found += [f"import {one}" for one in modules if one.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name, given = _dotted(node.func), {one.arg: one.value for one in node.keywords}
            truths = {key for key, value in given.items() if getattr(value, "value", None) is True}
            found += [name] if name in FORBIDDEN_CALLS else []
            found += ["shell=True"] if getattr(given.get("shell"), "value", "shell" in given) else []
            found += ["allow_pickle"] if getattr(given.get("allow_pickle"), "value", "allow_pickle" in given) else []
            found += ["torch.load without weights_only=True"] if (
                name.endswith("torch.load") and "weights_only" not in truths) else []
    return found


def test_the_package_holds_nothing_that_runs_what_a_file_says():
    files = [file for folder in ("nnunet_cfcl", "trainers") for file in sorted((ROOT / folder).rglob("*.py"))]
    found = {(str(file.relative_to(ROOT)), what)
             for file in files for what in dangers(file.read_text(encoding="utf-8"))}
    assert len(files) > 150 and found == set(ALLOWED)


@pytest.mark.parametrize("source", [
    "eval('1')", "import pickle", "from pickle import loads", "import subprocess\nsubprocess.run('ls', shell=True)",
    "subprocess.run('ls', shell=flag)", "import torch\ntorch.load('a')", "torch.load('a', weights_only=False)",
    "np.load('a', allow_pickle=True)", "import os\nos.system('ls')", "exec(compile('1', 'a', 'exec'))"])
def test_what_is_looked_for_would_be_found(source):
    assert dangers(source)


def test_what_is_harmless_is_not_found():
    assert not dangers("network.eval()\ntorch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)\n"
                       "re.compile('a')\nsubprocess.run(['ls'], shell=False)")


# ---------------------------------------------------------------- names stay in their folder


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_is_a_path_is_none_of_a_file(name):
    assert not is_safe_filename(name)


@pytest.mark.parametrize("name", ["case_1", "Ärztehaus 3", "a..b", ".hidden", "2020-01-01T10:00", "x" * 200])
def test_other_names_are(name):
    assert is_safe_filename(name)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_pool_manifest_with_a_path_for_a_name_is_refused(tmp_path, name):
    record = {"shape": [1, 2, 2, 2], "silver": False, "quality": 1.0, "quality_given": False, "probabilities": False,
              "files": ["a.b2nd"], "sources": "", "content": ""}
    for cases in ({name: record}, {"a": {**record, "files": [name]}}):
        text = json.dumps({"format": 1, "preprocessing": "", "complete": True, "cases": cases})
        manifest_file(tmp_path / "pool").write_text(text)
        with pytest.raises(UserError, match="invalid file names"):
            read_manifest(tmp_path / "pool")


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_intervention_with_a_path_for_a_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="is part of a file name"):
        CounterfactualStore.create(tmp_path / "store", [name], "test")
    assert not (tmp_path / "store").exists()
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "source": "x", "interventions": [name]}))
    with pytest.raises(UserError, match="is part of a file name"):
        CounterfactualStore.open(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..\\x", "a/b", "C:x"])
def test_a_method_with_a_path_for_a_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="is not a valid name of a method"):
        named_folders([f"{name}={tmp_path}"])


def test_cases_of_a_table_are_looked_up_among_the_known_ones_and_open_no_file(tmp_path):
    known = [f"case_{number:02d}" for number in range(24)]
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = [f"{case},{'AB'[number % 2]}" for number, case in enumerate(known)]
    rows += ["../../x,A", "/etc/passwd,B", "C:\\x,A", "<b>,B"]
    (raw / "attributes.csv").write_text("case,scanner\n" + "\n".join(rows) + "\n")
    table, lines, before = read_attribute_table(raw), [], sorted(tmp_path.rglob("*"))
    attributes = KnownAttributes(table.attributes, {}, "attributes.csv")
    _, interventions = coding_and_interventions(attributes, known, known, ".png", None, lines.append)
    assert [one.name for one in interventions] == ["scanner"]
    assert any("rows of 4 cases that are neither in the dataset nor in its pool" in line for line in lines)
    (raw / "silver.csv").write_text("case,quality\ncase_00,0.5\n../../x,0.9\n/etc/passwd,1\n")
    assert read_qualities(raw / "silver.csv", set(known), ".png", []) == {"case_00": 0.5}
    assert sorted(tmp_path.rglob("*")) == sorted([*before, raw / "silver.csv"])


def test_an_attribute_with_a_path_for_a_name_becomes_no_intervention(tmp_path):
    cases = [f"case_{number:02d}" for number in range(24)]
    columns = {"../../x": {case: "AB"[number % 2] for number, case in enumerate(cases)}}
    with pytest.raises(UserError, match=r"is part of a file name .* '\.\./\.\./x'"):
        coding_and_interventions(KnownAttributes(columns, {}, "attributes.csv"), cases, cases, ".png", None, print)


def test_a_link_in_the_place_of_a_file_is_replaced_and_what_it_leads_to_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name in ("file", "file.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write_text_atomically(tmp_path / "file", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()


def test_a_setting_that_names_a_folder_without_a_store_is_refused_and_nothing_is_written_there(tmp_path):
    with pytest.raises(UserError, match="is not a counterfactual store"):
        CounterfactualStore.open(tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- texts are texts

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\'{{7*7}}'


def _hostile(content):
    """With the harmful text at the end of every other text, and as a further key."""
    if isinstance(content, dict):
        return {**{key: _hostile(value) for key, value in content.items()}, HOSTILE: HOSTILE}
    if isinstance(content, list):
        return [*map(_hostile, content), HOSTILE]
    return content + HOSTILE if isinstance(content, str) else content


def test_the_report_escapes_every_text_in_every_file_that_it_reads(tmp_path):
    fold = write_complete(tmp_path)
    next(one for one in READERS if one.name == "report: metrics.json").make(tmp_path)
    own = fold / "cfcl"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    kept = {key: metrics["summaries"][0][key] for key in ("metric", "grouping")}
    metrics = _hostile(metrics)
    # by these two its records are found
    metrics["summaries"][0] |= kept
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    for file in (own / "config.json", own / "generator/report/report.json", own / "probe/probe.json",
                 fold / "validation/summary.json", fold / "debug.json"):
        file.write_text(json.dumps(_hostile(json.loads(file.read_text()))))
    log = next(fold.glob("training_log_*.txt"))
    log.write_text(log.read_text().replace("Epoch", f"{HOSTILE} Epoch") + f"2026-05-01 12:00:00: {HOSTILE}\n")
    read, measured = read_fold(fold), read_metrics(tmp_path)
    shown = [sections.overview(read), sections.settings(read), sections.gate(read, 200), sections.probe(read, 200),
             Section("metrics", HOSTILE, HOSTILE, HOSTILE, metrics_blocks(measured, measured.methods, 200))]
    page = tmp_path / "page.html"
    page.write_text(render([Chapter("fold1", HOSTILE, HOSTILE, (), shown)]), encoding="utf-8")
    found = Page(page)
    check_is_harmless(found)
    assert found.text().count("<script>alert(1)</script>") > 10 and "<script" not in found.source.lower()
    assert "{{7*7}}" in found.text()


def test_an_error_shows_what_a_terminal_would_obey():
    error = UserError("the file \x1b[2J\x07a\nb\u202e.csv is wrong", "correct\tit", ["line\r\n1"])
    assert str(error) == "the file \\x1b[2J\\x07a\\nb\\u202e.csv is wrong; fix: correct\\tit\n  line\\r\\n1"
    assert len(printable("x" * 10**6)) < 5000 and printable("Müller, 5 µm") == "Müller, 5 µm"
