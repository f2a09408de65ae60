"""Fine-tuning, evaluation and recalibration."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import DataError, FineTune, Progress
from compressor.training.evaluate import evaluate, recalibrate
from compressor.training.fine_tune import rate_at, train
from compressor.training.gradients import squared_gradients
from tests.networks import Residual


def blobs(count=64, seed=0):
    """Five classes that differ in their mean."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 5, (count,), generator=generator)
    x = torch.randn(count, 3, 8, 8, generator=generator) * 0.5 + y.view(-1, 1, 1, 1).float()
    return TensorDataset(x, y)


LOADER = DataLoader(blobs(), batch_size=16, shuffle=True)


def test_training_raises_accuracy():
    model = Residual()
    before = evaluate(model, LOADER).value
    train(model, LOADER, FineTune(epochs=12, learning_rate=0.05, distillation=0))
    assert evaluate(model, LOADER).value > max(before, 60)


class Stop(Progress):
    """Stands in for a kill: raises when so many batches are done."""

    def __init__(self, at):
        self.at, self.lines = at, []

    def tick(self, done, total, text):
        self.lines.append((done, total, text))
        if done == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 6, 8, 11])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, at):
    original = Residual()
    settings = FineTune(epochs=3, learning_rate=0.05)
    whole = copy.deepcopy(original)
    train(whole, LOADER, settings, teacher=original)
    broken, checkpoint = copy.deepcopy(original), tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(broken, LOADER, settings, original, checkpoint, progress=Stop(at))
    resumed = copy.deepcopy(original)
    train(resumed, LOADER, settings, original, checkpoint)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_progress_tells_loss_accuracy_and_how_far_it_is():
    progress = Stop(-1)
    train(Residual(), LOADER, FineTune(epochs=2), progress=progress)
    assert [done for done, _, _ in progress.lines] == list(range(1, 9))
    assert {total for _, total, _ in progress.lines} == {8}
    assert "loss" in progress.lines[-1][2]
    assert "loss" in progress.lines[-1][2]


def test_modes_and_the_global_generator_are_left_alone():
    model, teacher = Residual().train(), Residual()
    model.bn1.eval()
    state = torch.get_rng_state()
    train(model, LOADER, FineTune(epochs=1), teacher)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not model.bn1.training


def test_a_student_that_only_distils_follows_its_teacher():
    teacher, student = Residual(), Residual()

    def apart():
        x = blobs().tensors[0]
        with torch.no_grad():
            logs = [F.log_softmax(network.eval()(x), 1) for network in (student, teacher)]
            return float(F.kl_div(*logs, reduction="batchmean", log_target=True))

    before = apart()
    train(student.train(), LOADER, FineTune(epochs=15, learning_rate=0.02, distillation=1.0), teacher=teacher)
    assert apart() < 0.5 * before


def test_the_rate_warms_up_and_falls_to_zero_along_a_cosine():
    settings = FineTune(epochs=10, learning_rate=1.0)
    assert rate_at(0.0, settings) < 0.1
    assert rate_at(0.1, settings) == pytest.approx(1, abs=0.01)
    assert rate_at(5, settings) == pytest.approx(0.5)
    assert rate_at(10, settings) == pytest.approx(0)


def test_recalibration_gives_the_statistics_of_the_data_and_keeps_momenta():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.Flatten(), nn.Linear(256, 5))
    assert recalibrate(model, LOADER) == 1
    x = model[0](blobs().tensors[0])
    torch.testing.assert_close(model[1].running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)  # equal batches
    assert model[1].momentum == 0.3
    assert recalibrate(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), LOADER) == 0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch"),
        ([torch.zeros(2, 3, 8, 8)], r"batch 0 must be a pair"),
        ([(torch.zeros(2, 3, 8, 8), torch.zeros(3))], r"batch 0: labels must be \(N,\), one per input"),
    ],
)
def test_unusable_validation_data_is_named(batches, message):
    with pytest.raises(DataError, match=message):
        evaluate(Residual(), batches)


def test_a_loss_that_is_not_finite_stops_with_the_batch():
    with pytest.raises(DataError, match=r"batch 0 in epoch 1 is not finite"):
        train(Residual(), [(torch.full((2, 3, 8, 8), float("nan")), torch.tensor([0, 1]))], FineTune(epochs=1))


def test_a_checkpoint_of_other_settings_or_another_network_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    train(Residual(), LOADER, FineTune(epochs=1), checkpoint=path)
    with pytest.raises(DataError, match="other fine-tuning settings"):
        train(Residual(), LOADER, FineTune(epochs=2), checkpoint=path)
    with pytest.raises(DataError, match="another network"):
        train(Residual(inner=13), LOADER, FineTune(epochs=1), checkpoint=path)


@pytest.mark.parametrize("options", [{"epochs": -1}, {"distillation": 1.5}, {"momentum": -0.1}, {"temperature": 0}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(DataError, match=next(iter(options))):
        FineTune(**options)


@pytest.mark.parametrize("y", [torch.tensor([0, 1, 9]), torch.tensor([0, -1, 1])])
def test_labels_that_are_no_classes_are_named(y):
    model, batches = Residual(), [(torch.randn(3, 3, 8, 8), y)]
    for look in (evaluate, lambda *given: train(*given, FineTune(epochs=1)), lambda *given: squared_gradients(*given, 3)):
        with pytest.raises(DataError, match=f"batch 0: labels go from {int(y.min())} to {int(y.max())}, but the model tells"):
            look(model, batches)


def test_a_network_for_deployment_is_trained_and_what_is_frozen_on_purpose_is_not():
    model = Residual()
    expected = copy.deepcopy(model)
    train(expected, LOADER, FineTune(epochs=1))
    found = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        train(found, LOADER, FineTune(epochs=1))
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))
    head = copy.deepcopy(model).requires_grad_(False)
    head.fc.requires_grad_(True)
    train(head, LOADER, FineTune(epochs=1))
    moved = [name for (name, a), b in zip(model.named_parameters(), head.parameters(), strict=True) if not torch.equal(a, b)]
    assert moved == ["fc.weight", "fc.bias"]
