"""Tasks: ready ones count what their name says, batches are read as they are, and what is wrong is told by name."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor import Metric, Task, tasks
from compressor.errors import DataError
from compressor.passes.statistics.distances import ClassDivergence, OwnDistance, SquaredError, distance_between, mean_of
from compressor.tasks import Samples
from compressor.training.evaluate import evaluate


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Gives(nn.Module):
    """A network that gives a part of its input."""

    def forward(self, x):
        return x


# ready tasks, each beside its definition


def test_accuracy_is_the_share_of_right_answers():
    logits, labels = seeded(40, 5), torch.arange(40) % 5
    batches = [(logits[:30], labels[:30]), (logits[30:], labels[30:])]
    expected = 100 * float((logits.argmax(1) == labels).float().mean())
    score = evaluate(Gives(), batches)
    assert (score.value, score.count) == (pytest.approx(expected), 40)
    assert float(tasks.classification().loss(logits, (None, labels))) == pytest.approx(float(F.cross_entropy(logits, labels)))
    smooth = tasks.classification(label_smoothing=0.2).loss(logits, (None, labels))
    assert float(smooth) == pytest.approx(float(F.cross_entropy(logits, labels, label_smoothing=0.2)))


def test_mean_intersection_over_union_is_that_of_a_confusion_matrix():
    logits, masks = seeded(6, 3, 8, 8), torch.randint(0, 3, (6, 8, 8), generator=torch.Generator().manual_seed(1))
    masks[0, 0] = 255
    task = tasks.segmentation(classes=3, ignore_index=255)
    score = evaluate(Gives(), Samples([(logits[:4], masks[:4]), (logits[4:], masks[4:])], task))
    found, counted = logits.argmax(1), masks != 255
    shares = []
    for k in range(3):
        a, b = (found == k) & counted, (masks == k) & counted
        shares.append(float((a & b).sum() / (a | b).sum()))
    assert score.value == pytest.approx(100 * sum(shares) / 3, abs=1e-3)
    expected = F.cross_entropy(logits, masks, ignore_index=255)
    assert float(task.loss(logits, (None, masks))) == pytest.approx(float(expected))


def test_smaller_logits_are_scaled_up_to_the_masks():
    logits, masks = seeded(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)
    wide = F.interpolate(logits, size=(8, 8), mode="bilinear", align_corners=False)
    assert float(tasks.segmentation(3).loss({"out": logits}, (None, masks))) == pytest.approx(float(F.cross_entropy(wide, masks)))


def test_psnr_is_ten_logarithms_of_the_mean_square():
    clean, noisy = seeded(4, 1, 6, 6).sigmoid(), seeded(4, 1, 6, 6, seed=1).sigmoid()
    score = evaluate(Gives(), Samples([(noisy, clean)], tasks.image_to_image()))
    assert score.value == pytest.approx(-10 * math.log10(float((clean - noisy).square().mean())), abs=1e-3)


def test_root_of_the_mean_square_and_less_is_better():
    outputs, wanted = seeded(9, 2), seeded(9, 2, seed=1)
    task = tasks.regression()
    score = evaluate(Gives(), Samples([(outputs[:5], wanted[:5]), (outputs[5:], wanted[5:])], task))
    assert score.value == pytest.approx(float((outputs - wanted).square().mean().sqrt()), rel=1e-5)
    assert task.metric.lost(1.0, 1.5) == 0.5
    assert tasks.classification().metric.lost(90.0, 88.0) == 2.0


def test_average_precision_of_several_labels():
    score = evaluate(Gives(), Samples([(torch.tensor([[3.0, -1], [1.0, 2], [-2.0, 1]]), torch.tensor([[1, 0], [0, 1], [1, 0]]))],
                                      tasks.multi_label(2)))  # fmt: skip
    first = (1 + 2 / 3) / 2  # ranks 1 and 3 of 3
    assert score.value == pytest.approx(100 * (first + 1) / 2, abs=1e-3)


def test_boxes_that_are_right_have_a_precision_of_one():
    box = torch.tensor([[1.0, 1.0, 6.0, 6.0]])

    def predictions(outputs):
        return [{"boxes": box + own[0], "scores": torch.ones(1), "labels": torch.zeros(1, dtype=torch.int64)} for own in outputs]

    task = tasks.detection(
        lambda outputs, batch: outputs.sum(), predictions,
        lambda batch: [{"boxes": box, "labels": torch.zeros(1, dtype=torch.int64)} for _ in batch[0]],
    )  # fmt: skip
    assert evaluate(Gives(), Samples([(torch.zeros(2, 1), None)], task)).value == pytest.approx(100)
    assert evaluate(Gives(), Samples([(torch.full((2, 1), 20.0), None)], task)).value == 0


# a task of the user's


def test_a_task_in_five_lines_reads_dicts_several_inputs_and_metrics_of_any_kind():
    from torchmetrics import MeanAbsoluteError

    class Both(nn.Module):
        def forward(self, image, depth):
            return {"sum": image + depth}

    batch = {"depth": seeded(4, 2, seed=1), "image": seeded(4, 2), "wanted": seeded(4, 2, seed=2), "name": list("abcd")}
    error = (batch["image"] + batch["depth"] - batch["wanted"]).abs().mean()
    by_torchmetrics = Metric.of(MeanAbsoluteError(), lambda outputs, batch: (outputs["sum"], batch["wanted"]))
    assert (by_torchmetrics.name, by_torchmetrics.higher_is_better) == ("MeanAbsoluteError", False)

    def mean_error(model, batches):
        return sum(float((model(b["image"], b["depth"])["sum"] - b["wanted"]).abs().mean()) for b in batches)

    for metric in (by_torchmetrics, mean_error):
        task = Task(lambda outputs, batch: F.l1_loss(outputs["sum"], batch["wanted"]), metric, inputs=lambda batch: batch)
        samples = Samples([batch], task, names=("image", "depth"))
        (sample,) = samples.read("validation")
        assert [x is batch[name] for x, name in zip(sample.inputs, ("image", "depth"), strict=True)] == [True, True]
        assert float(sample.loss(sample.outputs(Both()))) == pytest.approx(float(error))
        score = evaluate(Both(), samples)
        assert (score.value, score.count) == (pytest.approx(float(error)), 4)


def test_batches_are_cut_where_every_tensor_has_a_row_per_sample_and_else_left_whole():
    rows = Samples([], tasks.classification()).sample((seeded(8, 3), torch.zeros(8, dtype=torch.int64)))
    assert [x.shape[0] for x in rows.first(3).tensors()] == [3, 3, 3]
    boxes = Samples([], Task(lambda o, b: o, Metric.of(lambda m, b: 0.0))).sample((seeded(8, 3), torch.zeros(21, 6)))
    assert boxes.first(3) is boxes


WRONG = {
    "inputs that are not there": (
        lambda b: b["img"],
        None,
        "inputs\\(batch\\) failed on \\(dict of image tensor \\(4, 2\\).*KeyError: 'img'",
    ),
    "inputs that are no tensor": (lambda b: b["name"], None, "the inputs must be a tensor"),
    "a loss of another signature": (None, lambda outputs: outputs.sum(), "loss\\(outputs, batch\\) failed.*TypeError"),
    "a loss per sample": (None, lambda outputs, batch: outputs.sum(1), "must return one number as a tensor"),
    "a loss that is a float": (None, lambda outputs, batch: 0.5, "must return one number as a tensor, it returned float"),
    "a loss that is not finite": (None, lambda outputs, batch: outputs.sum() / 0, "the loss is not finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_task_is_told(case):
    inputs, loss, message = WRONG[case]
    batch = {"image": seeded(4, 2), "name": ["a", "b"]}
    task = Task(loss or (lambda o, b: o.sum()), lambda model, batches: 0.0, inputs=inputs or (lambda b: b["image"]))

    def used():
        for sample in Samples([batch], task).read("validation"):
            sample.loss(sample.outputs(Gives()))

    with pytest.raises(DataError, match=message):
        used()


@pytest.mark.parametrize(("metric", "message"), [
    (lambda model, batches: "good", "a number is needed, found str"),
    (lambda model, batches: float("nan"), "not a number"),
    (lambda model: 1.0, "failed on .*TypeError"),
])  # fmt: skip
def test_a_metric_that_is_no_number_is_told(metric, message):
    with pytest.raises(DataError, match=message):
        evaluate(Gives(), Samples([seeded(4, 2)], Task(lambda o, b: o.sum(), metric)))


def test_a_metric_has_one_way_to_be_found():
    with pytest.raises(DataError, match="a metric is a"):
        Task(lambda o, b: o.sum(), 3)
    with pytest.raises(DataError, match="give a meter"):
        Metric("nothing")


# how outputs are compared


def test_divergence_is_that_of_softened_probabilities():
    one, other = seeded(5, 4), seeded(5, 4, seed=1)
    expected = F.kl_div(F.log_softmax(one / 4, 1), F.log_softmax(other / 4, 1), reduction="batchmean", log_target=True)
    own = ClassDivergence()
    assert float(mean_of(own.terms(own.kept(one), own.kept(other)))) == pytest.approx(float(expected), rel=1e-5)


def test_squared_errors_are_shares_averaged_over_nested_outputs_and_added_up_over_batches():
    wanted = [
        {"a": seeded(3, 2), "b": (torch.arange(3), seeded(3, 4, seed=1))},
        {"a": seeded(2, 2, seed=2), "b": (torch.arange(2), seeded(2, 4, seed=3))},
    ]
    found = [{"a": 2 * own["a"], "b": (own["b"][0] + 1, own["b"][1])} for own in wanted]
    own = SquaredError()
    assert distance_between(own, [own.kept(y) for y in wanted], [own.kept(y) for y in found]) == pytest.approx(0.5)
    with pytest.raises(DataError, match="changed their structure"):
        own.terms(own.kept(found[0]), own.kept(found[1]))


def test_a_distance_of_the_users_is_weighed_by_samples():
    own = OwnDistance(lambda outputs, wanted: (outputs - wanted).abs().mean())
    assert distance_between(own, [torch.zeros(3), torch.zeros(1)], [torch.ones(3), 5 * torch.ones(1)]) == pytest.approx(2)
    with pytest.raises(DataError, match="must return one number"):
        OwnDistance(lambda outputs, wanted: outputs).terms(torch.zeros(3), torch.zeros(3))


def test_what_is_no_classifier_is_asked_what_it_is_for(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    data = [(seeded(8, 1, 8, 8), torch.zeros(8, 2, 4, 4))]
    with pytest.raises(DataError, match="say what it is for by task="):
        compressor.compress(net, (seeded(1, 1, 8, 8),), validate=data, budget=compressor.Budget(macs=0.5), out=tmp_path / "run")


def test_tasks_with_other_functions_are_told_apart_and_the_same_ones_are_not():
    def task(loss, inputs=lambda batch: batch[0]):
        return Task(loss, lambda model, batches: 0.0, inputs=inputs).to_dict()

    def made():
        return task(lambda outputs, batch: outputs.sum())

    assert made() == made()
    assert task(lambda outputs, batch: outputs.sum()) != task(lambda outputs, batch: outputs.mean())
    assert task(lambda outputs, batch: 2 * outputs) != task(lambda outputs, batch: 3 * outputs)


def test_settings_and_what_is_closed_over_tell_tasks_apart():
    from torchmetrics.classification import MulticlassAccuracy

    def by(metric):
        return Task(lambda o, b: o.sum(), metric)

    def weighed(weight):
        return Task(lambda o, b: weight * o.sum(), lambda model, batches: 0.0)

    pairs = [
        (tasks.segmentation(3), tasks.segmentation(3, ignore_index=255)), (tasks.image_to_image(1.0), tasks.image_to_image(255.0)),
        (tasks.classification(), tasks.classification(0.1)), (weighed(0.5), weighed(0.1)),
        (by(MulticlassAccuracy(5, average="macro")), by(MulticlassAccuracy(5, average="micro"))),
    ]  # fmt: skip
    for one, other in pairs:
        assert one.to_dict() != other.to_dict()
    assert weighed(0.5).to_dict() == weighed(0.5).to_dict()
    assert tasks.segmentation(3).to_dict() == tasks.segmentation(3).to_dict()


def test_batches_with_one_entry_per_sample_are_left_whole():
    own = Task(lambda o, b: o, Metric.of(lambda m, b: 0.0))
    targets = [{"boxes": torch.zeros(2, 4)}, {"boxes": torch.zeros(2, 4)}]
    listed = Samples([], own).sample((seeded(2, 3), targets))
    assert listed.first(1) is listed
    boxes = tasks.detection(lambda o, b: o, lambda o: [], lambda b: [])
    flat = Samples([], boxes).sample((seeded(4, 3), torch.zeros(4, 6)))
    assert flat.first(1) is flat


def test_metrics_that_fail_are_told():
    from torchmetrics.classification import MulticlassAccuracy

    data = [(seeded(8, 5), torch.arange(8) % 5)]
    with pytest.raises(DataError, match="metric MulticlassAccuracy: "):
        evaluate(Gives(), Samples(data, Task(lambda o, b: o.sum(), MulticlassAccuracy(5, average=None))))
    with pytest.raises(DataError, match="is a class: pass what it makes"):
        Task(lambda o, b: o.sum(), MulticlassAccuracy)


def test_the_output_that_counts_is_the_one_that_is_compared():
    outputs = {"features": seeded(4, 16), "logits": seeded(4, 5, seed=1)}
    assert torch.equal(ClassDivergence().kept(outputs), ClassDivergence().kept(outputs["logits"]))
