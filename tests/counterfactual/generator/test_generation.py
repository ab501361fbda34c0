"""A store filled by a generator: draws, resumed runs and regenerated files."""

import json
import multiprocessing
import os
import queue
import signal
import threading
from dataclasses import replace
from unittest import mock

import blosc2
import numpy as np
import pytest
import torch

from nnunet_cfcl.counterfactual.generator import generation
from nnunet_cfcl.counterfactual.generator.generation import RECORD, Generation, generate_counterfactuals
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.counterfactual.generator.whole_cases import SlidingWindowCounterfactuals
from nnunet_cfcl.counterfactual.store import CounterfactualStore, find_store
from nnunet_cfcl.data.attributes import Attribute
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows
from nnunet_cfcl.runs import lock
from tests.conftest import CasesInMemory
from tests.counterfactual.random_generator import CODING, DISEASE, INTERVENTIONS, SCANNER, encoded, random_generator
from tests.runs.watching import is_watched

CELLS = {"case_0": {"scanner": "A", "disease": "no", "age": "40"}, "case_1": {"scanner": "B", "disease": "yes"},
         "case_2": {"scanner": "NA", "disease": "yes", "age": "70", "patient": "p"}}
NAMES = ["scanner", "disease", "scanner+disease"]
WANTED = Generation("abc", INTERVENTIONS, seed=3, preprocessing="plan")


def arrays(count=3) -> dict[str, np.ndarray]:
    return {f"case_{n}": np.random.default_rng(n).normal(size=(1, 2, 20 + n, 14)) for n in range(count)}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "Dataset001_X" / "nnUNetPlans_2d"


@pytest.fixture
def generate(folder):
    """Factory: a store with the counterfactuals of some cases, by default of all cases and with `WANTED`."""

    def make(images=None, cells=CELLS, wanted=WANTED, generator=None, **more) -> CounterfactualStore:
        generator = generator or random_generator()
        blender = SlidingWindowCounterfactuals(
            generator, CasesInMemory(images or arrays()), SlidingWindows(generator.patch_size), 4, False)
        return generate_counterfactuals(blender, cells, wanted, folder, print, **more)

    return make


def record(store) -> dict:
    return json.loads((store.folder / RECORD).read_text())


def written(store) -> dict[str, int]:
    """File -> time of its creation."""
    return {path.name: path.stat().st_mtime_ns for path in sorted((store.folder / "cases").iterdir())}


def test_every_case_gets_every_intervention_in_its_own_shape(generate, folder):
    store = generate()
    assert list(store.interventions) == NAMES and store.folder == WANTED.folder(folder)
    store.check({case: image.shape for case, image in arrays().items()})
    assert (store.data_identifier, store.preprocessing) == ("nnUNetPlans_2d", "plan")
    assert store.source == "generator:abc, abduction: mean, seed 3"


def test_a_generated_store_is_not_mistaken_for_an_imported_one(generate, folder):
    mine = generate()
    assert find_store(folder) is None
    brought = CounterfactualStore.create(folder.with_name(f"{folder.name}_cfcl_cf") / "mine", ["x"], "import")
    assert find_store(folder) == brought.folder != mine.folder


def test_the_store_holds_sliding_window_counterfactuals_of_the_recorded_attributes(generate):
    generator, image = random_generator(), np.random.default_rng(0).normal(size=(1, 1, 16, 12))
    store = generate({"case_0": image}, generator=generator)
    own = torch.from_numpy(image[:, 0]).float()[None]
    for name in NAMES:
        values = record(store)["case_0"][name]
        assert values["before"] == CELLS["case_0"]
        changed = {key for key in values["after"] if values["after"][key] != values["before"][key]}
        assert changed == set(name.split("+"))
        expected = generator.counterfactuals(own, encoded(values["before"]), encoded(values["after"]))
        np.testing.assert_allclose(store.read("case_0", name)[:, 0], expected[0].numpy(), atol=2e-3)


def test_an_attribute_that_is_not_known_may_become_any_value_and_stays_unknown_elsewhere(generate):
    cells = {f"case_{n}": {"scanner": "?"} for n in range(40)}
    values = [WANTED.values(case, cells[case], CODING) for case in cells]
    assert {one["scanner"]["after"]["scanner"] for one in values} == {"A", "B", "C"}
    assert {one["disease"]["after"]["disease"] for one in values} == {"no", "yes"}
    assert all(one["scanner"]["before"] == {} and set(one["scanner"]["after"]) == {"scanner"} for one in values)
    assert record(generate(cells={}))["case_1"]["scanner"]["before"] == {}


def test_of_more_than_two_values_every_other_one_is_drawn_and_never_the_own():
    cases = [f"case_{n}" for n in range(40)]
    drawn = {WANTED.values(case, {"scanner": "B"}, CODING)["scanner"]["after"]["scanner"] for case in cases}
    assert drawn == {"A", "C"}


def test_new_values_depend_on_seed_case_and_intervention_alone():
    values = lambda wanted, case="case_5": wanted.values(case, {}, CODING)  # noqa: E731
    other = replace(WANTED, interventions=INTERVENTIONS[::-1], generator="xyz")
    assert values(other) == values(WANTED)
    alone = replace(WANTED, interventions=INTERVENTIONS[2:])
    assert values(alone)["scanner+disease"] == values(WANTED)["scanner+disease"]
    cases = [f"case_{n}" for n in range(20)]
    assert [values(WANTED, case) for case in cases] != [values(replace(WANTED, seed=4), case) for case in cases]
    sampled = replace(WANTED, abduction="sample")
    assert len({sampled.noise_seed(case) for case in cases}) == 20 and WANTED.noise_seed("case_0") is None
    assert sampled.noise_seed("case_0") != replace(sampled, seed=4).noise_seed("case_0")


def test_samples_of_the_posterior_do_not_depend_on_the_other_cases(generate):
    wanted = replace(WANTED, abduction="sample")
    together = generate(wanted=wanted)
    found = {case: together.read(case, "scanner") for case in arrays()}
    for path in (together.folder / "cases").iterdir():
        path.unlink()
    alone = generate({"case_2": arrays()["case_2"]}, wanted=wanted)
    np.testing.assert_array_equal(alone.read("case_2", "scanner"), found["case_2"])
    means = generate()
    assert np.abs(means.read("case_2", "scanner") - found["case_2"]).max() > 0.05


def test_existing_files_are_kept_and_missing_files_are_regenerated_identically(generate):
    store = generate()
    before, image = written(store), store.read("case_1", "disease")
    assert written(generate()) == before
    store.path("case_1", "disease").unlink()
    after = written(generate())
    assert after.keys() == before.keys() and [n for n in after if after[n] != before[n]] == ["case_1__disease.b2nd"]
    np.testing.assert_array_equal(store.read("case_1", "disease"), image)


def test_cases_that_are_new_are_added_and_those_of_another_run_stay(generate):
    store = generate(arrays(1))
    before = written(store)
    generate({case: image for case, image in arrays().items() if case != "case_0"})
    assert before.items() <= written(store).items() and len(written(store)) == 9
    assert set(record(store)) == set(arrays())


def test_only_a_case_whose_attributes_were_corrected_is_regenerated(generate):
    store = generate()
    before, old = written(store), record(store)
    generate(cells={**CELLS, "case_0": {**CELLS["case_0"], "age": "90"}})
    changed = [name for name, time in written(store).items() if time != before[name]]
    assert changed == sorted(f"case_0__{name}.b2nd" for name in NAMES)
    assert record(store)["case_0"]["scanner"]["before"]["age"] == "90"
    assert {**record(store), "case_0": None} == {**old, "case_0": None}


def test_a_case_of_another_shape_and_a_damaged_file_are_regenerated(generate):
    store = generate()
    store.path("case_0", "scanner").write_bytes(b"no such thing")
    larger = {**arrays(), "case_1": np.random.default_rng(9).normal(size=(1, 3, 18, 14))}
    generate(larger)
    store.check({case: image.shape for case, image in larger.items()})


def test_a_stopped_run_leaves_a_record_that_never_describes_a_file_wrongly(generate):
    """Stopped between the new record and the new files."""
    store, cells = generate(), {**CELLS, "case_0": {**CELLS["case_0"], "scanner": "C"}}
    with mock.patch.object(generation, "_generate", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        generate(cells=cells)
    assert not any(store.path("case_0", name).exists() for name in NAMES)
    generate(cells=cells)
    store.check({case: image.shape for case, image in arrays().items()})


def _killed_at_the_fifth_file(folder):
    torch.set_num_threads(1)
    replaced, original = [], os.replace

    def replace_or_die(source, target):
        if str(target).endswith(".b2nd"):
            replaced.append(target)
            if len(replaced) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)

    os.replace = replace_or_die
    generator = random_generator()
    blender = SlidingWindowCounterfactuals(generator, CasesInMemory(arrays()), SlidingWindows(generator.patch_size), 4,
                                           False)
    generate_counterfactuals(blender, CELLS, WANTED, folder, print)


def test_a_killed_run_is_resumed(generate, folder):
    process = multiprocessing.get_context("spawn").Process(target=_killed_at_the_fifth_file, args=(folder,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    store = CounterfactualStore.open(WANTED.folder(folder))
    before = {name: time for name, time in written(store).items() if name.endswith(".b2nd")}
    assert len(before) == 4
    generate()
    assert before.items() <= written(store).items()
    store.check({case: image.shape for case, image in arrays().items()})
    assert not list((store.folder / "cases").glob("*.tmp"))


def test_a_second_run_waits_and_finds_all_files(generate, folder, monkeypatch):
    monkeypatch.setattr(lock, "SECONDS_BETWEEN_TRIES", 0.05)
    told: queue.Queue[str] = queue.Queue()
    blender = SlidingWindowCounterfactuals(random_generator(), CasesInMemory(arrays()), SlidingWindows((16, 12)), 4,
                                           False)
    second = threading.Thread(target=generate_counterfactuals, args=(blender, CELLS, WANTED, folder, told.put))
    with lock.exclusive(WANTED.folder(folder), print):
        second.start()
        assert "waiting for it to finish" in told.get(timeout=60)
        assert not (WANTED.folder(folder) / "cases").exists()
    second.join(60)
    before = written(CounterfactualStore.open(WANTED.folder(folder)))
    assert len(before) == 9 and written(generate()) == before


def test_stores_of_other_generators_interventions_seeds_and_preprocessings_are_kept_apart(folder):
    other = Intervention((Attribute("scanner", "categorical", ("A", "B", "C", "D")),))
    variants = [WANTED, replace(WANTED, generator="abd"), replace(WANTED, interventions=INTERVENTIONS[:2]),
                replace(WANTED, seed=4), replace(WANTED, abduction="sample"), replace(WANTED, preprocessing="plan 2"),
                replace(WANTED, interventions=(other, *INTERVENTIONS[1:]))]
    assert len({one.folder(folder) for one in variants}) == len(variants)
    assert len({one.source for one in variants}) == 4  # the manifest names interventions and preprocessing itself
    assert replace(WANTED, interventions=INTERVENTIONS[::-1]).folder(folder) == WANTED.folder(folder)
    assert WANTED.folder(folder).parent.name == "nnUNetPlans_2d_cfcl_cf"


def test_a_value_unknown_to_the_generator_raises_before_anything_is_written(generate, folder):
    with pytest.raises(UserError, match="'scanner' has the values A, B, C, found 'Z'"):
        generate(cells={**CELLS, "case_2": {"scanner": "Z"}})
    assert not WANTED.folder(folder).exists()


def test_an_attribute_whose_name_is_no_valid_file_name_raises(generate):
    odd = replace(WANTED, interventions=(Intervention((replace(DISEASE, name="disease"),)),
                                         Intervention((replace(SCANNER, name="scanner/site"),))))
    with pytest.raises(UserError, match="must not contain .* found 'scanner/site'"):
        generate(wanted=odd)


def test_files_have_the_layout_of_their_cases_where_it_is_known(generate):
    store = generate(layout=lambda case: ((1, 1, 20, 14), (1, 1, 10, 14)) if case == "case_0" else (None, None))
    file = blosc2.open(str(store.path("case_0", "scanner")), mode="r")
    assert file.chunks == (1, 1, 20, 14) and file.blocks == (1, 1, 10, 14)


def test_an_unreadable_record_raises_with_its_path(generate):
    store = generate()
    (store.folder / RECORD).write_text("{")
    with pytest.raises(UserError, match=r"attributes\.json is not valid JSON .* delete it"):
        generate()


def test_the_generation_is_watched_and_every_slab_is_progress(generate, monkeypatch):
    slabs, beats = [], []
    monkeypatch.setattr(generation, "beat", lambda: beats.append(len(slabs)))
    make = SlidingWindowCounterfactuals.slabs

    def noted(*given):
        for slab in make(*given):
            slabs.append(is_watched())
            yield slab

    monkeypatch.setattr(SlidingWindowCounterfactuals, "slabs", noted)
    generate()
    assert len(slabs) > 3 and all(slabs)
    assert beats == [0, 0, 0, *range(1, len(slabs) + 1)]
