"""trace: the same outputs, names and modes; errors that name what is wrong."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor.passes.transforms.verify import verify_removal
from tests.networks import Residual

X = torch.randn(2, 3, 8, 8)


def test_the_graph_computes_what_the_model_computes_at_two_batch_sizes():
    model = Residual().eval()
    graph = compressor.trace(model, (X[:1],))
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(graph(x), model(x))


def test_names_and_state_dict_keys_are_kept_and_tensors_are_not_shared():
    model = Residual()
    graph = compressor.trace(model, (X,))
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert isinstance(graph.get_submodule("bn1"), nn.BatchNorm2d)
    with torch.no_grad():
        graph.get_parameter("fc.weight").zero_()
    assert model.fc.weight.abs().sum() > 0


def test_modes_of_the_model_are_restored_and_taken_over():
    model = Residual()
    model.bn1.eval()
    graph = compressor.trace(model, (X,))
    assert model.training
    assert not model.bn1.training
    assert graph.training
    assert not graph.get_submodule("bn1").training
    assert not compressor.trace(model.eval(), (X,)).training


def test_norms_and_dropout_know_train_from_eval():
    graph = compressor.trace(Residual(), (X,)).train()
    assert isinstance(graph.get_submodule("drop"), nn.Dropout)
    assert not torch.equal(graph(X), graph(X))
    assert graph.get_submodule("bn1").num_batches_tracked == 2
    graph.eval()
    assert torch.equal(graph(X), graph(X))


def test_momentum_that_the_graph_does_not_record_comes_from_the_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None, eps=0.1))
    graph = compressor.trace(model, (X,))
    assert graph.get_submodule("1").momentum is None
    assert graph.get_submodule("1").eps == 0.1


def test_the_graph_fine_tunes_like_the_model():
    model = Residual().train()
    model.drop.p = 0.0
    graph = compressor.trace(model, (X,)).train()
    for network in (model, graph):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(X), torch.tensor([0, 1])).backward()
            optimizer.step()
    for (name, a), (_, b) in zip(sorted(model.state_dict().items()), sorted(graph.state_dict().items()), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_weights_used_under_two_strides_stay_exact():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.a(x)[:, :, ::2, ::2] + F.conv2d(x, self.a.weight, self.a.bias, stride=2, padding=1)

    model = Shared()
    graph = compressor.trace(model, (X,))
    assert torch.equal(graph(X), model(X))
    assert graph.state_dict().keys() == model.state_dict().keys()


def test_parameters_that_are_never_read_are_left_out_and_named():
    class Auxiliary(Residual):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.Linear(3, 3)

    graph = compressor.trace(Auxiliary(), (X,))
    assert graph.meta["compressor.unused"] == ("auxiliary.bias", "auxiliary.weight")


def test_another_spatial_size_is_refused_in_our_words():
    graph = compressor.trace(Residual(), (X,))
    with pytest.raises(compressor.TraceError, match=r"shape \(2, 3, 9, 8\).*trace the model again"):
        graph(torch.randn(2, 3, 9, 8))


def test_a_batch_that_cannot_be_dynamic_is_fixed_and_said(caplog):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.a(x).reshape(2, -1)

    graph = compressor.trace(Fixed(), (X,))
    assert not graph.meta["compressor.dynamic_batch"]
    assert "cannot be dynamic" in caplog.text
    assert graph(X).shape == (2, 144)


def test_statistics_of_the_batch_in_eval_mode_stay_a_function():
    class Always(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.0, self.eps)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Always(4)).eval()
    graph = compressor.trace(model, (X,))
    torch.testing.assert_close(graph(X), model(X))


def test_model_buffers_inputs_and_keys_are_left_alone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.register_buffer("table", torch.randn(4, 1, 1), persistent=False)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.a(x.relu_()) + self.table

    model, x = Counting(), X.clone()
    graph = compressor.trace(model, (x,))
    assert model.calls == 0
    assert torch.equal(x, X)
    assert "table" not in graph.state_dict()


def test_an_input_that_the_model_writes_to_is_as_it_was_after_every_call():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x, y):
            x *= 255
            y[:, 1:].add_(1)
            return self.a(x) + y

    model, x, y = Scales().eval(), torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    graph = compressor.trace(model, (x, y))
    given = x.clone(), y.clone()
    first, second = graph(*given), graph(*given)
    assert torch.equal(given[0], x)
    assert torch.equal(given[1], y)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, model(x, y))  # which writes to them
    channels = compressor.analyze(graph)
    plan = channels.plan(0.5)
    verify_removal(channels, plan, compressor.apply(plan, graph))


def test_a_decorated_forward_has_a_dynamic_batch():
    def decorated(forward):
        @functools.wraps(forward)
        def wrapper(self, *args, **kwargs):
            return forward(self, *args, **kwargs)

        return wrapper

    class Decorated(Residual):
        @decorated
        def forward(self, pixels):
            return super().forward(pixels)

    graph = compressor.trace(Decorated().eval(), (X,))
    assert graph.meta["compressor.dynamic_batch"]
    assert graph(torch.randn(5, 3, 8, 8)).shape == (5, 5)


def test_a_model_that_remembers_its_last_shape_has_a_dynamic_batch():
    class Remembers(Residual):
        shape = None

        def forward(self, x):
            if self.shape != x.shape:
                self.shape, self.grid = x.shape, torch.zeros(x.shape[0], 5)
            return super().forward(x) + self.grid

    graph = compressor.trace(Remembers().eval(), (torch.randn(2, 3, 8, 8),))
    assert graph.meta["compressor.dynamic_batch"]
    assert graph(torch.randn(5, 3, 8, 8)).shape == (5, 5)


def test_a_forward_with_varargs_has_a_dynamic_batch():
    class Any(Residual):
        def forward(self, *xs):
            return super().forward(xs[0])

    graph = compressor.trace(Any().eval(), (X,))
    assert graph.meta["compressor.dynamic_batch"]
    assert graph(torch.randn(3, 3, 8, 8)).shape == (3, 5)


def test_dropout_without_a_module_gets_a_name_at_the_root_too():
    class Dropouts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return F.dropout(self.a(F.dropout(x, 0.5, self.training)), 0.2, self.training)

    graph = compressor.trace(Dropouts(), (X,))
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert names == ["dropout", "a", "dropout_2"]
    assert compressor.analyze(graph).unknown == ()


class Dependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = self.a(x)
        if x.sum() > 0:  # data-dependent
            x = x + 1
        return x


class Leaves(nn.Module):
    """Goes on in numpy, where nothing can follow."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.from_numpy(self.a(x).detach().numpy())


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Residual(), X, "must be a tuple"),
        (Residual(), (), "non-empty tuple"),
        (Residual(), ("x",), r"example_inputs\[0\] must be a tensor"),
        ("model", (X,), "must be a torch.nn.Module"),
        (Residual(), (torch.zeros(1, 4, 8, 8),), r"does not run on inputs of shape \(1, 4, 8, 8\).*check the input shape"),
        (Dependent(), (X,), r"cannot be exported at .*test_trace.py:\d+.*Decisions by the values of tensors.*backbone"),
        (Leaves(), (X,), r"cannot be exported at .*test_trace.py:\d+(?!.*Decisions).* Hand over the part that can be traced"),
    ],
)
def test_wrong_use_is_said(model, inputs, message):
    with pytest.raises(compressor.TraceError, match=message):
        compressor.trace(model, inputs)
