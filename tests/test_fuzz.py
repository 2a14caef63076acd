"""Property tests: the grid functions on any tensor, and the scripts' parsers on any words."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval import parse as parse_eval
from quant import Grid, fake_quantize_weight, prune_weights, weight_scale
from train import parse as parse_train
from train import parser as train_parser
from utils.cli import UserError

# No limits of time: a loaded machine is no fault.
UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=UNCHECKED)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def tensors(draw):
    """0-d to 4-d, empty, non-contiguous, all zero, with one huge outlier or denormals; any float dtype."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    kind = draw(st.sampled_from(["plain", "zeros", "outlier", "denormal", "equal", "small"]))
    if kind == "zeros":
        values = torch.zeros(shape)
    elif kind == "outlier" and values.numel():
        values.view(-1)[0] = 3e4
    elif kind == "denormal":
        values = values * 1e-41
    elif kind == "equal":
        values = torch.full(shape, 0.7)
    elif kind == "small":
        values = values * 1e-4
    values = values.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()) and values.dim() > 1:
        values = values.transpose(0, -1)
    return values


@QUICK
@given(tensors(), st.integers(2, 8), st.booleans(), st.sampled_from(["absmax", "mse"]))
def test_quantized_values_are_on_the_grid_near_and_stay(weight, bits, per_channel, weight_range):
    quantized = fake_quantize_weight(weight, Grid(bits, per_channel=per_channel, weight_range=weight_range))
    assert quantized.shape == weight.shape and quantized.dtype == weight.dtype
    assert quantized.isfinite().all()
    if not weight.numel():
        return
    scale = weight_scale(weight, Grid(bits, per_channel=per_channel, weight_range=weight_range))
    assert (scale > 0).all() and scale.isfinite().all()
    limit = 2 ** (bits - 1) - 1
    integers = (quantized.double() / scale.double()).round()
    assert integers.abs().max() <= limit
    tiny = torch.finfo(weight.dtype)
    slack = 4 * tiny.eps * weight.double().abs().max() + tiny.smallest_normal
    assert ((integers * scale.double() - quantized.double()).abs() <= slack).all()
    if weight_range == "absmax":
        assert ((weight.double() - quantized.double()).abs() <= scale.double() / 2 + slack).all()
        # The largest value is kept, so quantizing again finds the same grid.
        again = fake_quantize_weight(quantized, Grid(bits, per_channel=per_channel))
        assert ((again.double() - quantized.double()).abs() <= slack).all()


@QUICK
@given(tensors().filter(lambda t: t.numel()), st.integers(2, 8), st.sampled_from([math.inf, -math.inf, math.nan]))
def test_what_is_not_finite_is_refused(weight, bits, bad):
    layer = torch.nn.Linear(2, 2).to(weight.dtype)
    layer.weight = torch.nn.Parameter(weight.contiguous())
    layer.weight.data.view(-1)[-1] = bad
    from quant import quantize_weights

    with pytest.raises(ValueError, match="weight has values that are not finite"):
        quantize_weights(layer, bits)
    if layer.weight.dim() > 1:
        with pytest.raises(ValueError, match="weight has values that are not finite"):
            prune_weights(layer, 0.5)


def flags_of(parser):
    return [action.option_strings[0] for action in parser._actions if action.option_strings]


WORDS = st.one_of(
    st.sampled_from(
        ["0", "1", "-1", "4", "8", "9", "32", "0.5", "1e999", "nan", "-inf", "", " ", "auto", "search", "x"]
    ),
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=6),
)


def check_one_line(parse, capsys):
    """Parses sys.argv; what is refused is one line and exit code 2."""
    capsys.readouterr()
    try:
        return parse()
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    except SystemExit as stop:
        err = capsys.readouterr().err
        assert stop.code == 0 or (stop.code == 2 and len(err.splitlines()) == 1 and "Traceback" not in err), err


@QUICK
@given(st.lists(st.tuples(st.sampled_from(flags_of(train_parser())), st.lists(WORDS, max_size=2)), max_size=4))
def test_any_words_after_train_py_parse_or_are_one_line(capsys, monkeypatch, tmp_path, pairs):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", *(word for flag, values in pairs for word in (flag, *values))])
    parsed = check_one_line(parse_train, capsys)
    if parsed:
        assert (parsed[0].sparsity is None) != (parsed[0].w_bit is None)


@QUICK
@given(st.lists(st.tuples(st.sampled_from(["--w_bit", "--a_bit", "--sparsity", "--clipping_range", "--percentile",
                                           "--calib_images", "--post", "--report"]), st.lists(WORDS, max_size=3)),
                max_size=4))  # fmt: skip
def test_any_words_after_eval_py_parse_or_are_one_line(capsys, monkeypatch, pairs):
    monkeypatch.setattr("sys.argv", ["eval.py", *(word for flag, values in pairs for word in (flag, *values))])
    args = check_one_line(parse_eval, capsys)
    if args:
        assert all(2 <= bits <= 8 or bits == 32 for bits in args.w_bit) and all(0 <= s < 1 for s in args.sparsity)
