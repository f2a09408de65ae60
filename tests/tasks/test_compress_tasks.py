"""`compress` for tasks other than classification: every method, every task, killed and resumed, and judged as the task says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor import AACP, CC, Budget, CaP, Compensation, FineTune, LeGR, Magnitude, Metric, Mimic, Target, Task, tasks
from compressor.errors import DataError, TraceError
from compressor.search.fitness import Fitness
from compressor.tasks import Samples
from compressor.training.evaluate import evaluate

SMALL = Compensation(images=64, positions=16)


class Restores(nn.Module):
    """Images from images, with a branch."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.act = nn.PReLU(16)

    def forward(self, x):
        y = self.act(self.first(x))
        return x + self.last(y + self.outer(F.relu(self.inner(y))))


class TwoEyes(nn.Module):
    """Two inputs, a dict of two outputs."""

    def __init__(self):
        super().__init__()
        self.rgb, self.depth = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.both = nn.Conv2d(16, 16, 3, padding=1)
        self.mask, self.edge = nn.Conv2d(16, 2, 1), nn.Conv2d(16, 1, 1)

    def forward(self, rgb, depth):
        y = F.relu(self.both(torch.cat([F.relu(self.rgb(rgb)), F.relu(self.depth(depth))], 1)))
        return {"mask": self.mask(y), "edge": self.edge(y)}


def pictures(count, channels=1, seed=0):
    x = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(x, size=(16, 16), mode="bilinear")


@pytest.fixture(scope="module")
def restoring():
    """A network that takes noise away, its data, and its task."""
    torch.manual_seed(0)
    clean = pictures(128)
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    data = list(zip(noisy.split(16), clean.split(16), strict=True))
    net, task = Restores(), tasks.image_to_image()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(25):
        for batch in data[2:]:
            optimizer.zero_grad()
            task.loss(net(batch[0]), batch).backward()
            optimizer.step()
    return net.eval(), data[2:], data[:2], task


METHODS = {
    "cap": CaP(compensation=SMALL, probes=32),
    "cap, depth": CaP(space="channels+ranks+depth", compensation=SMALL, probes=32),
    "cap as published": CaP.published(),
    "legr": LeGR(trials=6, fitness=Fitness("compensate", holdout=32, images=64)),
    "aacp as published": AACP.published(6),
    "cc": CC(compensation=SMALL),
    "magnitude by gradients": Magnitude("taylor"),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_compresses_what_is_no_classifier(name, restoring, tmp_path):
    net, train, validate, task = restoring
    result = compressor.compress(
        net, (torch.zeros(1, 1, 16, 16),), task=task, train=train, validate=validate, budget=Budget(macs=0.6),
        method=METHODS[name], target=Target("fake", align=2), finetune=FineTune(epochs=1, learning_rate=1e-3),
        out=tmp_path / "run",
    )  # fmt: skip
    assert result.met
    assert (result.metric.name, result.metric.unit) == ("PSNR", "dB")
    assert result.steps[0].metric == pytest.approx(
        evaluate(compressor.trace(net, (torch.zeros(1, 1, 16, 16),)), Samples(validate, task)).value
    )
    assert result.steps[-1].metric == pytest.approx(evaluate(result.graph, Samples(validate, task)).value, abs=1e-4)
    assert "PSNR dB" in result.summary()
    assert "PSNR against measured latency" in (tmp_path / "run" / "report.html").read_text()


def test_killed_and_resumed_is_uninterrupted(restoring, tmp_path):
    net, train, validate, task = restoring

    class Dies(compressor.Progress):
        def stage(self, text):
            if "fine-tune" in text:
                raise KeyboardInterrupt

    def run(out, progress=None):
        return compressor.compress(
            net, (torch.zeros(1, 1, 16, 16),), task=task, train=train, validate=validate, budget=Budget(macs=0.5),
            method=METHODS["cap"], target=Target("fake", align=2), finetune=FineTune(epochs=1), out=out, progress=progress,
        )  # fmt: skip

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Dies())
    resumed = run(tmp_path / "killed")
    assert resumed.plan == whole.plan
    assert [step.metric for step in resumed.steps] == [step.metric for step in whole.steps]


def test_a_floor_is_in_the_unit_of_the_metric(restoring, tmp_path):
    net, train, validate, task = restoring
    original = evaluate(net, Samples(validate, task)).value
    result = compressor.compress(
        net, (torch.zeros(1, 1, 16, 16),), task=task, calibrate=train, validate=validate, out=tmp_path / "run",
        method=CaP(floor=original - 1, compensation=SMALL, probes=32), target=Target("fake", align=1),
    )  # fmt: skip
    assert result.steps[-1].macs < result.steps[0].macs
    assert result.steps[-1].metric > original - 1.5


def test_a_drop_of_a_metric_of_which_less_is_better(restoring, tmp_path):
    net, train, validate, _ = restoring
    task = tasks.regression()
    original = evaluate(net, Samples(validate, task)).value
    result = compressor.compress(
        net, (torch.zeros(1, 1, 16, 16),), task=task, calibrate=train, validate=validate, out=tmp_path / "run",
        budget=Budget(drop=0.02), method=METHODS["cap"], target=Target("fake", align=1),
    )  # fmt: skip
    assert original < result.steps[-1].metric <= original + 0.02


def test_without_labels_any_network_is_judged_by_its_agreement(restoring, tmp_path):
    net, train, _, _ = restoring
    result = compressor.compress(
        net, (torch.zeros(1, 1, 16, 16),), calibrate=[x for x, _ in train], budget=Budget(macs=0.6), out=tmp_path / "run",
        method=METHODS["cap"], target=Target("fake", align=2), finetune=Mimic(steps=20),
    )  # fmt: skip
    assert result.metric.name == "agreement with the original"
    assert result.steps[0].metric == pytest.approx(100, abs=1e-4)
    assert result.steps[1].metric < result.steps[2].metric <= 100
    assert "agreement %" in result.summary()


def test_several_inputs_and_a_dict_of_outputs(tmp_path):
    torch.manual_seed(0)
    rgb, depth = pictures(96, 3), pictures(96, seed=1)
    mask, edge = (rgb.mean(1) > depth[:, 0]).long(), rgb.mean(1, keepdim=True) * depth
    whole = {"depth": depth, "rgb": rgb, "mask": mask, "edge": edge}
    data = [{name: own[k : k + 16] for name, own in whole.items()} for k in range(0, 96, 16)]
    task = Task(
        loss=lambda y, batch: F.cross_entropy(y["mask"], batch["mask"]) + F.mse_loss(y["edge"], batch["edge"]),
        metric=Metric("right", "%", meter=Right),
        inputs=lambda batch: {name: batch[name] for name in ("depth", "rgb")},
    )
    net = TwoEyes()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(30):
        for batch in data[1:]:
            optimizer.zero_grad()
            task.loss(net(batch["rgb"], batch["depth"]), batch).backward()
            optimizer.step()
    result = compressor.compress(
        net, (rgb[:1], depth[:1]), task=task, train=data[1:], validate=data[:1], budget=Budget(macs=0.5), out=tmp_path / "run",
        method=METHODS["cap"], target=Target("onnxruntime", align=2), finetune=FineTune(epochs=1, learning_rate=1e-3),
    )  # fmt: skip
    assert result.met
    assert result.steps[0].metric > 80
    assert result.steps[-1].metric > 70
    assert set(result.graph(rgb[:2], depth[:2])) == {"mask", "edge"}


class Right:
    def __init__(self):
        self.right = self.count = 0

    def update(self, outputs, batch):
        self.right += int((outputs["mask"].argmax(1) == batch["mask"]).sum())
        self.count += batch["mask"].numel()

    def compute(self):
        return 100 * self.right / self.count


def test_training_by_a_function_of_the_users(restoring, tmp_path):
    net, train, validate, task = restoring
    seen = {}

    def own(model, context):
        seen.update(training=model.training, folder=context.folder, task=context.task, batches=len(list(context.train)))
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for batch in context.train:
            optimizer.zero_grad()
            context.task.loss(model(batch[0]), batch).backward()
            optimizer.step()

    def run(finetune, out="run"):
        return compressor.compress(
            net, (torch.zeros(1, 1, 16, 16),), task=task, train=train, validate=validate, budget=Budget(macs=0.5),
            method=METHODS["cap"], target=Target("fake", align=2), finetune=finetune, out=tmp_path / out,
        )  # fmt: skip

    result = run(own)
    assert seen == {"training": True, "folder": tmp_path / "run" / "front" / "0" / "training", "task": task, "batches": len(train)}
    assert not result.graph.training
    assert result.steps[3].name == "fine-tuned"
    assert run(own).steps == result.steps

    def breaks(model, context):
        next(model.parameters()).data.fill_(float("nan"))

    with pytest.raises(DataError, match=r"finetune\(model, context\) left"):
        run(breaks, "nan")
    with pytest.raises(DataError, match=r"finetune\(model, context\) failed.*TypeError"):
        run(lambda model: None, "signature")


class Whole(nn.Module):
    """Its head decides by values, so that it cannot be traced as a whole."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = self.backbone(2 * x).mean((2, 3))
        return self.head(y) if float(y.detach().abs().sum()) >= 0 else -self.head(y)


def test_a_part_is_compressed_and_the_whole_is_judged(tmp_path):
    torch.manual_seed(0)
    x = pictures(160)
    labels = (x.mean((1, 2, 3)) > 0.5).long() + 2 * (x[:, :, :8].mean((1, 2, 3)) > x[:, :, 8:].mean((1, 2, 3))).long()
    data = list(zip(x.split(32), labels.split(32), strict=True))
    net = Whole()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        for batch in data[1:]:
            optimizer.zero_grad()
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            optimizer.step()
    with pytest.raises(TraceError, match="cannot be exported"):
        compressor.trace(net, (x[:1],))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = compressor.compress(
        net.eval(), (x[:1],), part="backbone", train=data[1:], validate=data[:1], budget=Budget(macs=0.5), out=tmp_path / "run",
        method=METHODS["cap"], target=Target("fake", align=2), finetune=FineTune(epochs=1, learning_rate=1e-3),
    )  # fmt: skip
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert result.steps[0].metric == evaluate(net, data[:1]).value > 50
    net.set_submodule("backbone", result.graph)
    assert result.steps[-1].metric == evaluate(net, data[:1]).value
    with pytest.raises(TraceError, match="no such submodule; its own are backbone, head"):
        compressor.compress(net, (x[:1],), part="neck", calibrate=data, budget=Budget(macs=0.5), out=tmp_path / "none")


class Wrapped(nn.Module):
    """What DistributedDataParallel and averages of weights look like."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_a_network_comes_back_from_training_elsewhere(restoring, tmp_path):
    net, train, validate, task = restoring
    inputs = (torch.zeros(1, 1, 16, 16),)
    result = compressor.compress(
        net, inputs, task=task, calibrate=train, validate=validate, budget=Budget(macs=0.5), method=METHODS["cap, depth"],
        target=Target("fake", align=2), out=tmp_path / "run",
    )  # fmt: skip
    graph = compressor.load(tmp_path / "run").train()
    wrapped = Wrapped(torch.compile(graph, backend="eager"))
    optimizer = torch.optim.Adam(wrapped.parameters(), 1e-3)
    for _ in range(5):
        for batch in train:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = task.loss(wrapped(batch[0]), batch)
            loss.backward()
            optimizer.step()
    found = compressor.finish(tmp_path / "run", wrapped, net, inputs, validate=validate, task=task)
    assert found.path == tmp_path / "run" / "finished"
    assert found.plan == result.plan
    assert found.steps[-1].metric == pytest.approx(evaluate(graph.eval(), Samples(validate, task)).value, abs=1e-4)
    assert found.steps[-1].metric > result.steps[-1].metric
    assert found.met
    again = compressor.load(tmp_path / "run" / "finished")
    assert torch.equal(again(validate[0][0]), found.graph(validate[0][0]))
    with pytest.raises(DataError, match="this is not the network of"):
        compressor.finish(tmp_path / "run", net, net, inputs, validate=validate, task=task)
    with pytest.raises(DataError, match="is no run"):
        compressor.finish(tmp_path / "other", graph, net, inputs, validate=validate, task=task)


@pytest.mark.parametrize("form", ["tensors", "tuples", "batches"])
def test_calibration_takes_inputs_alone_or_the_batches_of_the_task(restoring, tmp_path, form):
    net, train, validate, own = restoring
    task = Task(lambda y, batch: own.loss(y, (None, batch["clean"])), mean_error, inputs=lambda batch: batch["noisy"])
    batches = {"tensors": [x for x, _ in train], "tuples": [(x,) for x, _ in train], "batches": as_dicts(train)}
    result = compressor.compress(
        net, (torch.zeros(1, 1, 16, 16),), task=task, calibrate=batches[form], validate=as_dicts(validate), budget=Budget(macs=0.6),
        method=METHODS["cap"], target=Target("fake", align=2), out=tmp_path / "run",
    )  # fmt: skip
    assert result.steps[2].name == "compensated"


def mean_error(model, batches):
    return sum(float((model(batch["noisy"]) - batch["clean"]).abs().mean()) for batch in batches)


def as_dicts(pairs):
    return [{"noisy": x, "clean": y} for x, y in pairs]


def test_a_part_that_writes_to_its_input_or_has_two_names_is_recorded_and_replaced():
    from compressor.pipeline.part import Part

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(1, 4, 3))
            self.all = nn.Sequential(self.backbone, nn.Flatten())

        def forward(self, image, scale):
            return self.all(image * scale)

    torch.manual_seed(0)
    image, scale = torch.randn(2, 1, 8, 8), torch.ones(2, 1, 1, 1)
    part = Part(Twice(), "backbone", (image, scale))
    assert part.names == ("image", "scale")
    assert torch.equal(part.example_inputs[0], image)
    zero = nn.Conv2d(1, 4, 3)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    assert float(part(zero)(image, scale).detach().abs().max()) == 0
    assert float(part(part.module)(image, scale).detach().abs().max()) > 0


def test_the_published_search_judges_a_part_in_its_model(tmp_path):
    torch.manual_seed(0)
    x = pictures(96)
    data = list(zip(x.split(32), (x.mean((1, 2, 3)) > 0.5).long().split(32), strict=True))
    result = compressor.compress(
        Whole().eval(), (x[:1],), part="backbone", calibrate=data[1:], validate=data[:1], budget=Budget(macs=0.7),
        method=CaP.published(), target=Target("fake", align=2), out=tmp_path / "run",
    )  # fmt: skip
    assert result.met
