"""Phase 3's loop: the teacher's average, resumption, micro-batches, what is learned and saved, messages."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs.checkpoint import load_checkpoint
from nnunet_cfcl.teacher import loop
from nnunet_cfcl.teacher.data import STREAM
from nnunet_cfcl.teacher.pseudo_labels import PseudoLabels
from tests.teacher.conftest import TwoOutputs


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [one.clone() for one in module.state_dict().values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Killed(Exception):
    """Stands in for a lost machine."""


@pytest.mark.parametrize("dim", [2, 3])
def test_a_run_killed_in_its_second_epoch_and_resumed_ends_with_the_same_weights(make_training, dim):
    whole = make_training("whole", dim=dim)
    whole.run(resume=False)
    killed = make_training("killed", dim=dim)
    step = killed.step

    def until(batch, number):
        if number == 3:
            raise Killed
        return step(batch, number)

    killed.step = until
    with pytest.raises(Killed):
        killed.run(resume=False)
    assert load_checkpoint(killed.latest)["epoch"] == 1
    resumed = make_training("killed", dim=dim)
    resumed.run(resume=True)
    assert same(weights(whole.plain), weights(resumed.plain))
    assert same(weights(whole.average), weights(resumed.average))
    assert whole.shares.found.tolist() == resumed.shares.found.tolist()
    lines = [json.loads(line) for line in (resumed.task.folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert (resumed.task.folder / "progress.png").is_file() and (resumed.task.folder / "pseudo_labels.png").is_file()


def test_the_teacher_is_the_average_of_the_students_with_a_rising_decay(make_training):
    training = make_training(settings={"teacher.decay": 0.7})
    expected, step = [], training.step

    def noted(batch, number):
        line = step(batch, number)
        decay = min(1 - 1 / (number + 1), 0.7)
        now = weights(training.plain)
        expected[:] = [decay * old + (1 - decay) * new for old, new in zip(expected, now)] if number else now
        for found, mean in zip(weights(training.average.module), expected, strict=True):
            assert torch.allclose(found, mean, atol=1e-7)
        return line

    training.step = noted
    training.run(resume=False)


@pytest.mark.parametrize("result", ["teacher", "student"])
def test_the_chosen_network_is_the_result(make_training, result):
    training = make_training(settings={"teacher.result": result})
    training.run(resume=False)
    chosen = {"teacher": training.average.module, "student": training.plain}[result]
    saved = load_checkpoint(training.final)["network_weights"]
    assert same(list(saved.values()), weights(chosen)) and not training.latest.exists()
    assert list(saved) == list(training.plain.state_dict())


def test_short_phases_average_fast_and_long_ones_slowly(make_training):
    assert make_training().decay == 0.99
    assert make_training(epochs=100, iterations=50).decay == 0.999
    assert make_training(epochs=100, iterations=50, settings={"teacher.decay": 0.5}).decay == 0.5


def gradients_of(training, batch, pseudo=None) -> list[torch.Tensor]:
    """Gradients of the pool's loss alone, of weight 1."""
    training.optimizer.zero_grad()
    torch.manual_seed(0)
    training._learn_pool(batch, training._labelled(), 0, 1.0)
    return [p.grad.clone() for p in training.parameters]


def test_the_pool_s_cross_entropy_does_not_depend_on_the_size_of_micro_batches(make_training, monkeypatch):
    # the Dice is that of a micro-batch, as nnU-Net's is that of a rank's batch
    def entropy(logits, labels, known, regions):
        return (torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="none") * known[:, 0]).mean()

    monkeypatch.setattr(loop, "pseudo_label_loss", entropy)
    found = [gradients_of(training, next(training.batches(0)))
             for training in (make_training(settings={"teacher.patches_per_pass": n}) for n in (4, 3, 1))]
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0], other, strict=True))
    assert max(float(one.abs().max()) for one in found[0]) > 1e-3


def test_weak_and_strong_views_show_the_same_place(make_training):
    settings = {"acquisition.probability": 0, "views.jitter_probability": 0, "views.blur_probability": 0,
                "views.solarise_probability": 0}
    training = make_training(settings=settings)
    weak, strong = training.render(next(training.batches(0)))
    assert len(weak) == 1 and torch.allclose(weak[0], strong, atol=1e-5)
    changed = make_training().render(next(make_training().batches(0)))[1]
    assert not torch.allclose(weak[0], changed, atol=1e-2)


def test_intensity_effects_alone_change_no_acquisition(make_training):
    settings = {"teacher.strong_view": "intensity", "views.jitter_probability": 0, "views.blur_probability": 0,
                "views.solarise_probability": 0}
    training = make_training(settings=settings)
    weak, strong = training.render(next(training.batches(0)))
    assert torch.equal(weak[0], strong)
    training = make_training(settings={"teacher.strong_view": "intensity"})
    assert not torch.allclose(training.render(next(training.batches(0)))[1], weak[0], atol=1e-2)


def test_a_plain_mean_teacher_sees_noise(make_training):
    training = make_training(settings={"teacher.strong_view": "noise", "teacher.noise": 0.5})
    weak, strong = training.render(next(training.batches(0)))
    ratio = (strong - weak[0]).flatten(1).std(1) / weak[0].flatten(1).std(1)
    assert torch.allclose(ratio, torch.full((4,), 0.5), atol=0.1)


def test_the_teacher_sees_the_image_on_the_labelled_scanner_too(make_training):
    class Brighter:
        def identity(self):
            return {}

        def read(self, case, box):
            return torch.full((1, *box.size[-2:]), 7.0) if case == "case_4" else None

    training = make_training(weak=Brighter())
    batch = next(training.batches(0))
    weak, _ = training.render(batch)
    assert len(weak) == 2
    for image, other in zip(*weak, strict=True):
        assert torch.equal(image, other) or torch.allclose(other[:, 4:-4, 4:-4], torch.tensor(7.0))


def test_pasted_boxes_bring_their_manual_labels(make_training):
    training = make_training(settings={"teacher.mix_probability": 1})
    images = torch.zeros(4, 1, 16, 20)
    nothing = PseudoLabels(torch.zeros(4, 1, 16, 20).long(), torch.zeros(4, 1, 16, 20).bool())
    labelled = torch.ones(2, 1, 16, 20), [torch.ones(2, 1, 16, 20).short(), None]
    pasted = 0
    for number in range(5):
        mixed, target, own = training._mix(images, nothing, labelled, number)
        assert torch.equal(target.labels == 1, mixed == 1) and torch.equal(target.known, mixed == 1) and not own.any()
        pasted += int(mixed.sum())
    assert pasted > 0
    training = make_training(settings={"teacher.mix_probability": 1, "teacher.paste_labelled": False})
    assert not any(training._mix(images, nothing, labelled, number)[0].any() for number in range(5))


def test_weight_0_goes_on_with_the_labels_alone(make_training, monkeypatch):
    monkeypatch.setattr(loop, "pseudo_labels", lambda *_: pytest.fail("the pool was labelled"))
    monkeypatch.setattr(loop, "PoolDataset", lambda *_: None)
    messages: list[str] = []
    training = make_training(settings={"teacher.weight": 0}, log=messages.append)
    before = weights(training.plain)
    training.run(resume=False)
    assert not same(before, weights(training.plain)) and "pool" not in messages[0]


def test_the_weight_rises_to_its_value(make_training):
    training = make_training(settings={"teacher.ramp_fraction": 0.5, "teacher.weight": 2})
    data = training.batches(0)
    found = [training.step(next(data), number)["weight"] for number in range(4)]
    assert found == pytest.approx([2 / 3, 4 / 3, 2, 2])


def test_pseudo_labels_of_a_class_that_grows_weigh_less(make_training, monkeypatch):
    weights = []
    monkeypatch.setattr(loop, "pseudo_label_loss", lambda logits, labels, known, regions: weights.append(
        (labels, known)) or logits.mean())
    training = make_training(settings={"teacher.confidence": 0.5, "teacher.paste_labelled": False})
    training.shares.found = torch.tensor([0.0, 1.0]).double()  # five times the manual share: trusted by 2 / 5
    training.step(next(training.batches(0)), 0)
    for labels, known in weights:
        assert known[labels == 1].tolist() == pytest.approx([0.4] * int((labels == 1).sum()))
        assert (known[labels == 0] == 1).all()
    assert any((labels == 1).any() for labels, _ in weights)


def test_a_class_beyond_its_bounds_is_reported(make_training):
    messages: list[str] = []
    training = make_training(log=messages.append, expected_shares=torch.tensor([0.999, 0.001]),
                             settings={"teacher.confidence": 0.5})
    training.run(resume=False)
    warning = next(line for line in messages if line.startswith("WARNING"))
    assert "times as much 'square' in the pool as the manual labels have" in warning


def test_the_learning_rate_falls_from_half_of_phase_2_s(make_training):
    training = make_training()
    data = training.batches(0)
    rates = [training.step(next(data), number)["learning_rate"] for number in range(6)]
    assert rates == pytest.approx([0.02 * 0.5 * (1 - number / 6) ** 0.9 for number in range(6)])


def test_every_step_counts_each_scanner_equally(make_training):
    training = make_training(epochs=20)
    groups = torch.cat([batch["group"] for batch, _ in zip(training.batches(0), range(40))])
    assert (groups == 0).sum() == (groups == 1).sum() == 80


def test_a_step_without_finite_gradients_changes_nothing(make_training):
    training = make_training(segmentation_loss=lambda outputs, target: outputs[0].mean() * torch.nan)
    before = weights(training.plain)
    line = training.step(next(training.batches(0)), 0)
    assert line["skipped"] == 1 and same(before, weights(training.plain)) and int(training.average.n_averaged) == 0


def test_a_checkpoint_of_another_training_is_refused(make_training):
    training = make_training()
    training.run(resume=False)
    training.final.rename(training.latest)
    with pytest.raises(UserError, match="was made with other settings, cases or weights of phase 2"):
        make_training(identity={"other": 1}).run(resume=True)


def test_a_network_without_deep_supervision_is_trained(make_training):
    class One(TwoOutputs):
        def forward(self, images):
            return super().forward(images)[0]

    torch.manual_seed(0)
    training = make_training(network=One(), output_weights=(1.0,),
                             segmentation_loss=lambda out, target: out.mean() * 0)
    training.run(resume=False)
    assert training.final.is_file()


def test_the_student_learns_the_other_scanner(make_training):
    """A network that knows bright squares labels counterfactuals of the pool otherwise, and less so after phase 3."""
    network = TwoOutputs()
    training = make_training(network=network, epochs=1, iterations=150, settings={"teacher.intensity_probability": 0})
    supervised = torch.optim.Adam(network.parameters(), 0.02)
    for _, batch in zip(range(150), training.task.labelled):
        supervised.zero_grad()
        training.task.segmentation_loss(network(batch["data"]), batch["target"]).backward()
        supervised.step()

    def disagreement() -> float:
        shares = []
        for _, batch in zip(range(5), training.batches(0)):
            weak, strong = training.render(batch)
            with torch.no_grad():
                one, other = (network(views)[0].argmax(1) for views in (weak[0], strong))
            shares.append(float((one != other).float().sum() / ((one + other) > 0).float().sum()))
        return sum(shares) / len(shares)

    before = disagreement()
    training.average.module.load_state_dict(network.state_dict())
    training.run(resume=False)
    assert disagreement() < 0.8 * before


def test_draws_are_separated_from_those_of_other_phases():
    assert STREAM > 0
