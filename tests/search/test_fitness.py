"""What a candidate is worth: the accuracy and loss of the network it stands for, the same every time."""

import pytest
import torch
import torch.nn.functional as F

import compressor
from compressor import Fitness, Target
from compressor.errors import DataError
from compressor.methods import Magnitude, Problem
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.tracing.trace import quiet_deepcopy
from compressor.search.fitness import Judge, samples
from compressor.training.evaluate import evaluate, recalibrate
from compressor.training.gradients import squared_gradients
from tests.methods.conftest import digits, net  # noqa: F401 - fixtures
from tests.methods.digits import pairs


@pytest.fixture(scope="module")
def case(net, digits):  # noqa: F811
    graph = compressor.trace(net, (torch.zeros(2, 1, 8, 8),))
    channels = compressor.analyze(graph)
    full = float(channels.costs_of(channels.full).macs[0])
    problem = Problem(channels, {"macs": 0.4 * full}, Target("fake", align=1), None, None, 0)
    plan = Magnitude("random", compensation=None).plan(problem)
    calibration = Calibration.read([(x,) for x, _ in pairs(digits["train"])], graph, 500)
    return channels, plan, calibration, pairs(digits["holdout"]), pairs(digits["train"])


def test_without_a_repair_it_is_the_pruned_networks_own(case):
    channels, plan, _, holdout, _ = case
    worth = Judge(channels, Fitness("none", "metric", holdout=10**6), holdout, None)(plan)
    graph = compressor.apply(plan, channels.graph).eval()
    assert worth.metric == pytest.approx(evaluate(graph, holdout).value)
    with torch.no_grad():
        loss = sum(float(F.cross_entropy(graph(x), y, reduction="sum")) for x, y in holdout) / sum(len(y) for _, y in holdout)
    assert worth.loss == pytest.approx(loss, rel=1e-4)
    assert worth.images == 400


def test_recalibration_is_that_of_the_whole_product(case):
    channels, plan, calibration, holdout, _ = case
    worth = Judge(channels, Fitness("recalibrate", "metric", holdout=10**6), holdout, calibration)(plan)
    graph = compressor.apply(plan, channels.graph).eval()
    recalibrate(graph, [(b[0], b[0]) for b in calibration.batches])
    assert worth.metric == pytest.approx(evaluate(graph, holdout).value, abs=0.3)  # another memory layout, other roundings
    assert worth.images == 900


def test_repairs_help_in_the_order_of_what_they_cost(case):
    channels, plan, calibration, holdout, train = case
    found = {
        name: Judge(channels, fitness, holdout, calibration, train)(plan).loss
        for name, fitness in {
            "none": Fitness("none"), "norms": Fitness("recalibrate"), "closed": Fitness("compensate", features="original"),
            "narrowed": Fitness("compensate"), "trained": Fitness("train", steps=60),
        }.items()
    }  # fmt: skip
    assert found["closed"] < found["norms"] < found["none"]
    assert found["narrowed"] < found["norms"]
    assert found["trained"] < found["none"]


@pytest.mark.parametrize("repair", ["none", "train", "recalibrate", "compensate"])
def test_the_same_candidate_is_worth_the_same_and_the_original_stays_as_it_is(case, repair):
    channels, plan, calibration, holdout, train = case
    before = {name: tensor.clone() for name, tensor in channels.graph.state_dict().items()}
    judge = Judge(channels, Fitness(repair, steps=5), holdout, calibration, train)
    one, other = judge(plan), judge(plan)
    assert (one.loss, one.metric, one.images) == (other.loss, other.metric, other.images)
    assert all(torch.equal(before[name], tensor) for name, tensor in channels.graph.state_dict().items())


def test_a_candidate_compensated_layer_after_layer_is_the_network_that_the_pass_gives(case):
    channels, plan, calibration, holdout, _ = case
    judge = Judge(channels, Fitness("compensate"), holdout, calibration)
    settings = Compensation(ridge=1e-4, positions=12)
    for own in (channels.plan(0.7), plan):
        small = compressor.apply(own, channels.graph).eval()
        graph = Compensate(channels, own, calibration.first(500), settings)(small).graph
        with torch.no_grad():
            loss = sum(float(F.cross_entropy(graph(x), y, reduction="sum")) for x, y in holdout) / sum(len(y) for _, y in holdout)
        assert judge(own).loss == pytest.approx(loss, rel=1e-4)


def test_the_holdout_is_the_first_images(case):
    channels, plan, _, holdout, _ = case
    few = [(x[:30], y[:30]) for x, y in holdout[:1]]
    assert Judge(channels, Fitness("none", holdout=30), holdout, None)(plan).loss == pytest.approx(
        Judge(channels, Fitness("none"), few, None)(plan).loss, rel=1e-4
    )


def test_a_network_that_wants_the_usual_memory_order_is_judged_too():
    class Views(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = torch.nn.Conv2d(1, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(128, 10)

        def forward(self, x):
            return self.fc(self.b(torch.relu(self.a(x))).view(x.shape[0], -1))

    channels = compressor.analyze(compressor.trace(Views(), (torch.zeros(2, 1, 8, 8),)))
    holdout = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))]
    assert Judge(channels, Fitness("none"), holdout, None)(channels.plan(0.5)).images == 4


def test_what_is_missing_or_wrong_is_told(case):
    channels, plan, calibration, holdout, _ = case
    with pytest.raises(DataError, match=r"compensates needs images"):
        Judge(channels, Fitness("compensate"), holdout, None)
    with pytest.raises(DataError, match=r"needs training data"):
        Judge(channels, Fitness("train"), holdout, calibration)
    with pytest.raises(DataError, match=r"no hold-out"):
        Judge(channels, Fitness("none"), [], calibration)
    with pytest.raises(DataError, match=r"not finite"):
        Judge(channels, Fitness("none"), [(torch.full((4, 1, 8, 8), float("inf")), torch.zeros(4, dtype=torch.int64))], None)(plan)
    with pytest.raises(DataError, match=r"known are none, train"):
        Fitness("magic")
    with pytest.raises(DataError, match=r"holdout=0"):
        Fitness(holdout=0)


class OneSize(torch.nn.Module):
    """A view that knows how many images there are."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 3)
        self.norm, self.head = torch.nn.BatchNorm2d(4), torch.nn.Linear(4 * 36, 10)

    def forward(self, x):
        return self.head(self.norm(self.two(torch.relu(self.one(x)))).view(50, -1))


@pytest.mark.parametrize("repair", ["none", "recalibrate", "compensate"])
def test_a_network_of_one_batch_size_is_judged_on_whole_batches(case, repair):
    _, _, _, holdout, train = case
    torch.manual_seed(0)
    graph = compressor.trace(OneSize().eval(), (torch.zeros(50, 1, 8, 8),))
    channels = compressor.analyze(graph)
    batches = [(x[:50], y[:50]) for x, y in holdout]
    calibration = Calibration.read([(x[:50],) for x, _ in train], graph, 100)
    judged = samples(Fitness(repair, holdout=70), batches, None, 0, whole=True)[0]
    worth = Judge(channels, Fitness(repair, holdout=70, images=100), judged, calibration)(channels.plan(0.5))
    assert worth.images == 100 + (0 if repair == "none" else 100)
    assert set(squared_gradients(graph, batches, 70)) == {name for name, _ in graph.named_parameters()}


def test_networks_that_ask_for_no_gradients_are_trained_all_the_same(case):
    channels, plan, calibration, holdout, train = case
    expected = Judge(channels, Fitness("train", steps=5), holdout, calibration, train)(plan).loss
    frozen = compressor.analyze(quiet_deepcopy(channels.graph).requires_grad_(False))
    with torch.no_grad():
        assert Judge(frozen, Fitness("train", steps=5), holdout, calibration, train)(plan).loss == expected
