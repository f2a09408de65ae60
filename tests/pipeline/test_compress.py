"""compress(): end to end on the fake back end; interrupted anywhere = uninterrupted."""

import contextlib
import copy
import fcntl
import itertools
import json

import pytest
import torch
from torch import nn

import compressor
from compressor import CC, Budget, CaP, Factorize, FineTune, Magnitude, Plan, Progress, Target
from compressor.passes.transforms.verify import relative_error
from compressor.training.fine_tune import train
from compressor.values.files import digest_of_tensors, load_tensors
from tests.networks import Residual, randomize
from tests.training.test_fine_tune import blobs

X = (torch.zeros(1, 3, 8, 8),)
torch.manual_seed(0)  # torch begins anywhere: some networks lose accuracy in two short epochs
MODEL = randomize(Residual(16, 24))


def batches(seed, count):
    x, y = blobs(count, seed).tensors
    return list(zip(x.split(16), y.split(16), strict=True))


def run(out, model=MODEL, budget=None, backend="fake", finetune=FineTune(epochs=2), train=None, align=4, **options):  # noqa: B008
    return compressor.compress(
        model,
        X,
        train=train or batches(0, 64),
        validate=batches(1, 32),
        test=batches(2, 32),
        budget=budget or Budget(latency=0.9, macs=0.6),
        target=Target(backend, align=align),
        finetune=finetune,
        out=out,
        **{"method": Magnitude(), **options},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.manual_seed(0)
    return run(tmp_path_factory.mktemp("whole") / "run")


def test_the_folder_holds_what_the_design_says(whole):
    member = whole.path / "front" / "0"
    for name in ("plan.json", "weights.safetensors", "network.safetensors", "model.onnx", "measurement.json"):
        assert (member / name).is_file()
        assert (whole.path / name).resolve() == (member / name).resolve()
    config = json.loads((whole.path / "run.json").read_text())
    assert config["config"]["seed"] == 0
    assert {"torch", "onnxruntime"} <= config["versions"].keys()
    left = [p.name for p in whole.path.rglob("*") if p.name.startswith(".") or "checkpoint" in p.name]
    assert left == [], "temporary files are gone"


def test_the_budget_holds_and_steps_are_in_order(whole):
    assert whole.met
    assert [step.name for step in whole.steps] == ["original", "channels removed", "compensated", "fine-tuned"]
    assert whole.steps[-1].macs <= 0.6 * whole.steps[0].macs
    assert whole.latency_ratio <= 0.9
    assert whole.steps[-1].params == sum(p.numel() for p in whole.graph.parameters())
    text = whole.summary()
    for word in ("accuracy", "latency ms", "MACs", "params", "fine-tuned", "budget latency", "(met)", "test data"):
        assert word in text


def test_the_report_is_self_contained(whole):
    text = (whole.path / "report.html").read_text()
    assert text.count("<svg") == 2
    assert "src=" not in text.replace("xmlns", "")
    assert "fine-tuned" in text
    assert "$" not in text.split("</style>")[1], "a placeholder was not filled"


def test_the_model_is_left_as_it_was():
    assert digest_of_tensors(MODEL.state_dict()) == digest_of_tensors(randomize_again().state_dict())


def randomize_again():
    other = copy.deepcopy(MODEL)
    return randomize(other)


def test_plan_and_weights_rebuild_the_network_on_a_fresh_copy(whole):
    x = torch.randn(3, 3, 8, 8)
    expected = whole.graph(x)
    plan = Plan.load(whole.path / "plan.json")
    assert plan == whole.plan
    graph = compressor.apply(plan, compressor.trace(Residual(16, 24), X))
    assert graph.state_dict().keys() == whole.graph.state_dict().keys()
    for loaded in (
        compressor.load(whole.path, Residual(16, 24)),
        compressor.load(whole.path),
        compressor.load(whole.path / "front" / "0"),
    ):
        with torch.no_grad():
            assert relative_error([loaded(x)], [expected]) < 1e-6  # the same ops on the same weights
    again = compressor.load(whole.path, Residual(16, 24)).train()
    again(x).sum().backward()


class StopAt(Progress):
    """Stands in for a kill at the k-th thing that is reported."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def stage(self, text):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt

    def tick(self, done, total, text):
        self.stage(text)


def test_interrupted_anywhere_and_started_again_equals_uninterrupted(whole, tmp_path):
    expected = digest_of_tensors(whole.graph.state_dict())
    counter = StopAt(-1)
    run(tmp_path / "count", progress=counter)
    assert counter.count > 20
    for at in range(2, counter.count + 1, 3):
        out = tmp_path / f"at-{at}"
        with pytest.raises(KeyboardInterrupt):
            run(out, progress=StopAt(at))
        result = run(out)
        assert result.plan == whole.plan
        assert digest_of_tensors(result.graph.state_dict()) == expected, at
        assert [step.metric for step in result.steps] == [step.metric for step in whole.steps]


def test_a_fine_tune_that_loses_accuracy_is_not_kept(tmp_path):
    model = copy.deepcopy(MODEL)
    train(model, batches(0, 64), FineTune(epochs=10, learning_rate=0.05))
    limit = Budget(macs=0.6)
    plain = run(tmp_path / "plain", model, limit, finetune=FineTune(epochs=0))
    assert [step.name for step in plain.steps] == ["original", "channels removed", "compensated"]
    at = next(k for k in range(1, 200) if _spoilt(tmp_path / f"at-{k}", model, limit, k))
    result = run(tmp_path / f"at-{at}", model, limit, finetune=SPOILING)  # killed after training, before it was judged
    names = [step.name for step in result.steps]
    assert names == ["original", "channels removed", "compensated", "fine-tuned", "compensated, kept"]
    assert result.steps[3].metric < result.steps[2].metric == result.steps[4].metric
    assert "compensated, kept" in result.summary()
    expected = digest_of_tensors(plain.graph.state_dict())
    for folder in (f"at-{at}", "whole"):
        for _ in range(2):  # as it ends, and as a finished run answers
            again = run(tmp_path / folder, model, limit, finetune=SPOILING)
            assert [step.name for step in again.steps] == names
            assert digest_of_tensors(again.graph.state_dict()) == expected
            assert digest_of_tensors(load_tensors(again.path / "weights.safetensors")) == expected


SPOILING = FineTune(epochs=1, learning_rate=2.0, distillation=0.0)


def _spoilt(out, model, limit, at):
    """Whether a run that is killed at the k-th thing it reports has just been fine-tuned."""
    with contextlib.suppress(KeyboardInterrupt):
        run(out, model, limit, finetune=SPOILING, progress=StopAt(at))
    return (out / "front" / "0" / "weights.safetensors").exists()


def test_a_finished_run_answers_at_once_without_training(whole):
    class Forbidden(Progress):
        def stage(self, text):
            assert "fine-tune" not in text
            assert "search" not in text

    again = run(whole.path, progress=Forbidden())
    assert again.plan == whole.plan
    assert digest_of_tensors(again.graph.state_dict()) == digest_of_tensors(whole.graph.state_dict())


def test_a_folder_that_holds_another_run_or_other_files_is_refused(whole, tmp_path):
    with pytest.raises(compressor.DataError, match=r"holds another run.*budget"):
        run(whole.path, budget=Budget(macs=0.5))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(compressor.DataError, match="not empty and holds no run"):
        run(tmp_path)
    with pytest.raises(compressor.DataError, match=r"choose another output folder"):
        run(tmp_path / "notes.txt")


def test_one_process_at_a_time_works_on_a_run(whole):
    with (whole.path / "run.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(compressor.DataError, match="another process is at work"):
            run(whole.path)
    assert run(whole.path).plan == whole.plan


def test_what_a_kill_left_half_written_is_swept(whole):
    left = whole.path / "front" / "0" / ".model.onnx-abc.partial"
    left.write_bytes(b"half")
    run(whole.path)
    assert not left.exists()


@pytest.mark.parametrize(("norm", "names"), [
    (nn.Identity(), ["original", "channels removed"]),
    (nn.BatchNorm2d(8), ["original", "channels removed", "norms recalibrated"]),
])  # fmt: skip
def test_norms_are_recalibrated_where_there_are_some(tmp_path, norm, names):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    data, method = [(torch.randn(32, 3, 8, 8), torch.randint(10, (32,)))], Magnitude(compensation=None)
    result = compressor.compress(
        model.eval(), X, calibrate=data, validate=data, budget=Budget(params=0.7), target=Target("fake"), method=method,
        out=tmp_path / "run",
    )  # fmt: skip
    assert [step.name for step in result.steps] == names


def test_without_training_data_nothing_is_trained(tmp_path):
    result = compressor.compress(
        MODEL, X, validate=batches(1, 32), budget=Budget(params=0.5), target=Target("fake"), out=tmp_path / "run"
    )
    assert [step.name for step in result.steps] == ["original", "channels removed"]
    assert result.met
    assert result.test is None


def test_other_weights_are_another_run(whole):
    other = copy.deepcopy(MODEL)
    with torch.no_grad():
        other.fc.bias.add_(1)
    with pytest.raises(compressor.DataError, match=r"holds another run.*weights"):
        run(whole.path, model=other)


def test_budgets_that_cannot_be_met_say_so_and_leave_the_folder_usable(tmp_path):
    with pytest.raises(compressor.BudgetError, match="cannot be met: the smallest legal network"):
        run(tmp_path / "run", budget=Budget(macs="100"))


def test_where_a_budget_cannot_be_met_another_may_be_asked_for_in_the_same_folder(tmp_path):
    budget = Budget(macs=0.6)
    expected = run(tmp_path / "fresh", budget=budget)
    with pytest.raises(compressor.BudgetError, match="cannot be met"):
        run(tmp_path / "run", budget=Budget(macs="100"))
    with pytest.raises(compressor.DataError, match="it differs in budget, seed"):
        run(tmp_path / "run", budget=budget, seed=1)
    found = run(tmp_path / "run", budget=budget)
    assert found.plan == expected.plan
    assert digest_of_tensors(found.graph.state_dict()) == digest_of_tensors(expected.graph.state_dict())
    with pytest.raises(compressor.DataError, match="it differs in budget"):
        run(tmp_path / "run", budget=Budget(macs=0.5))


class Restless:
    """Other images at each reading, drawn by a generator that nobody else can reach."""

    def __init__(self):
        self.random = torch.Generator().manual_seed(0)

    def __iter__(self):
        return iter([(x + 0.1 * torch.randn(x.shape, generator=self.random), y) for x, y in batches(0, 64)])


def test_other_data_are_another_run_but_data_that_never_are_the_same_go_on(whole, tmp_path, caplog):
    with pytest.raises(compressor.DataError, match=r"a run on other data \(the first batch of train is another;"):
        run(whole.path, train=batches(3, 64))
    found = run(tmp_path / "run", train=Restless(), finetune=FineTune(epochs=0))
    again = run(tmp_path / "run", train=Restless(), finetune=FineTune(epochs=0))
    loader = Restless()
    next(iter(loader))
    assert "others at each reading" not in caplog.text
    third = run(tmp_path / "run", train=loader, finetune=FineTune(epochs=0))
    assert "the images of train are others at each reading" in caplog.text
    assert found.plan == again.plan == third.plan


def test_a_model_with_nothing_to_remove_is_refused_with_the_reason(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten())
    with pytest.raises(compressor.BudgetError, match=r"nothing in this model can be removed.*model output"):
        run(tmp_path / "run", model=model)


class Sorted(nn.Module):
    """Channels that pass through an op without a rule: none can go."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.fc = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3), nn.Linear(24, 5)

    def forward(self, x):
        x = torch.sort(self.inner(torch.sort(self.stem(x), 1)[0]), 1)[0]
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("method", [CC(), CaP(space="channels+ranks"), Factorize(choice="rate")], ids=lambda own: own.name)
def test_ranks_go_where_no_channel_can(tmp_path, method):
    with pytest.raises(compressor.BudgetError, match=r"nothing in this model can be removed.*aten\.sort"):
        run(tmp_path / "channels", Sorted(), method=CaP())
    result = run(tmp_path / "ranks", Sorted(), Budget(macs=0.7), method=method, finetune=FineTune(epochs=0))
    assert result.met
    assert [one.layer for one in result.plan.factors] == ["inner"]


@pytest.mark.parametrize("limits", [Budget(params=0.6), Budget(memory=0.6)], ids=str)
def test_biases_that_compensation_adds_are_within_the_budget(tmp_path, limits):
    torch.manual_seed(1)  # with these weights the network that fills the budget would be over it
    sizes = (3, 12, 16, 16)
    convs = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(sizes)]
    layers = [own for conv in convs for own in (conv, nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5, bias=False))
    result = run(tmp_path / "run", model, limits, method=CaP(), finetune=FineTune(epochs=0), align=1)
    assert any(name.endswith("bias") for name in result.graph.state_dict())
    assert result.met


def test_absolute_latency_and_the_real_back_end(tmp_path):
    result = run(tmp_path / "run", budget=Budget(latency="10 s"), backend="onnxruntime", method=Magnitude("l2", "uniform"))
    assert result.widths["conv1"] == (24, 24), "nothing needs to go"
    assert result.compressed.target["backend"] == "onnxruntime"
    assert result.met
