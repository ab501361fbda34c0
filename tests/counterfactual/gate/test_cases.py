"""The balanced choice of cases, and their counterfactuals."""

from collections import Counter

import torch

from nnunet_cfcl.counterfactual.gate.cases import (
    balanced_choice,
    counterfactuals_of,
    intervene,
    reconstructions_of,
    subset,
)
from nnunet_cfcl.counterfactual.generator.data import Patches
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding

SITE, AGE = Attribute("site", "categorical", ("A", "B", "C")), Attribute("age", "continuous", (), 50, 10)
CODING = AttributeCoding((SITE, AGE))


class Recorder:
    """Add 1 and the index of the new site; record the number of images per call."""

    device, coding, scale = torch.device("cpu"), CODING, None

    def __init__(self):
        self.given = []

    def counterfactuals(self, images, parents, others):
        self.given.append(len(images))
        assert parents.shape == others.shape == (len(images), CODING.width)
        return images + 1 + others[:, :3].argmax(1).view(-1, 1, 1, 1)

    def reconstruct(self, images, parents):
        return images / 2


def patches(sites: str, per_case: int = 1) -> Patches:
    count = len(sites) * per_case
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    return Patches(images, tuple(f"c{n // per_case}" for n in range(count)),
                   tuple({"site": sites[n // per_case], "age": str(n)} for n in range(count)),
                   torch.arange(count, dtype=torch.int16).view(-1, 1, 1).expand(-1, 4, 4))


def test_groups_take_turns_however_rare_they_are():
    chosen = balanced_choice(patches("A" * 40 + "BBB" + "C"), CODING, 9, 0)
    assert Counter(cells["site"] for cells in chosen.cells) == {"A": 5, "B": 3, "C": 1}


def test_cases_take_turns_before_one_comes_again():
    chosen = balanced_choice(patches("AAAA", per_case=5), CODING, 4, 0)
    assert len(set(chosen.cases)) == 4
    assert Counter(balanced_choice(patches("AAAA", per_case=5), CODING, 8, 0).cases) == {f"c{n}": 2 for n in range(4)}


def test_the_choice_is_that_of_the_seed_and_never_more_than_there_are():
    all_ = patches("AB" * 10)
    one, same, other = (balanced_choice(all_, CODING, 6, seed).cases for seed in (0, 0, 1))
    assert one == same != other
    assert balanced_choice(all_, CODING, 99, 0).cases == all_.cases


def test_a_subset_keeps_images_cells_and_labels_together():
    found = subset(patches("ABC"), [2, 0])
    assert found.cases == ("c2", "c0") and [cells["site"] for cells in found.cells] == ["C", "A"]
    assert found.images[:, 0, 0, 0].tolist() == [2, 0] and found.labels[:, 0, 0].tolist() == [2, 0]


def test_many_images_go_through_a_few_at_a_time():
    generator, many = Recorder(), patches("A" * 35)
    after = [{"site": "C"}] * 35
    found = counterfactuals_of(generator, many.images, many.cells, after)
    assert torch.equal(found, many.images + 3) and generator.given == [16, 16, 3]
    assert torch.equal(reconstructions_of(generator, many), many.images / 2)


def test_an_intervention_changes_its_attributes_to_other_values_and_keeps_the_rest():
    changed = intervene(Recorder(), patches("ABCA" * 5), Intervention((SITE,)), (0,))
    before = patches("ABCA" * 5)
    for n, cells in enumerate(changed.cells):
        assert cells["site"] != before.cells[n]["site"] and cells["age"] == before.cells[n]["age"]
        expected = before.images[n] + 1 + SITE.values.index(cells["site"])
        assert torch.equal(changed.counterfactuals[n], expected)
    assert changed.places.tolist() == list(range(20))
    again, other = (intervene(Recorder(), before, Intervention((SITE,)), (key,)).cells for key in (0, 1))
    assert again == changed.cells != other
