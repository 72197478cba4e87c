"""Step times: bounds for any layout, closed forms, a simulated pipeline, published rows."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import step_time as benchmark
from megatron_chatflow.config import ResolvedConfig
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.accelerators import Accelerator, accelerators, find_accelerator
from megatron_chatflow.planner.layer_time import Coefficients, LayerTimes
from megatron_chatflow.planner.parameters import flops_per_token
from megatron_chatflow.planner.step_settings import PRECISIONS, StepSettings, step_settings_of
from megatron_chatflow.planner.step_time import (
    DEFAULT_FACTOR,
    EXPECTED_ERROR,
    calibration_factor,
    predict_step,
)
from megatron_chatflow.utils.user_files import load_yaml
from tests.planner.measure import LLAMA, VOCAB, small

H100 = find_accelerator("H100-SXM")
# No link, kernel or collective takes time.
INSTANT = dataclasses.replace(H100, nvlink_bandwidth=1e30, network_bandwidth=1e30)
NO_LATENCY = Coefficients(kernel=0, collective=0)


def step(world_size: int = 8, **values: Any) -> StepSettings:
    """A step of a 0.4B model; fields that no setting has replace those of the settings."""
    names = {field.name for field in dataclasses.fields(StepSettings)}
    extra = {
        k: values.pop(k)
        for k in ("precision", "context_parallel_size", "stages", "use_megatron_fsdp")
        if k in values
    }
    assert extra.keys() <= names
    model = LLAMA | {
        "num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "num_query_groups": 4,
        "ffn_hidden_size": 2816, "seq_length": 2048, "global_batch_size": max(64, 2 * world_size),
        "bf16": True,
    }  # fmt: skip
    config = cast(ResolvedConfig, small(world_size, model, **values))
    return dataclasses.replace(step_settings_of(config, VOCAB, world_size), **extra)


@st.composite
def steps(draw: st.DrawFn) -> StepSettings:
    """Layouts of 64 GPUs."""
    tp, pp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    chunk = draw(st.sampled_from([None, 1, 3])) if pp > 1 else None
    mbs = draw(st.sampled_from([1, 2]))
    full = draw(st.booleans())
    return step(
        64,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=chunk,
        sequence_parallel=tp > 1 and draw(st.booleans()),
        micro_batch_size=mbs,
        global_batch_size=64 // (tp * pp) * mbs * pp * draw(st.integers(1, 3)),
        use_distributed_optimizer=draw(st.booleans()),
        overlap_grad_reduce=draw(st.booleans()),
        recompute_granularity="full" if full else None,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        precision=draw(st.sampled_from(["bf16", "tensorwise", "delayed", "blockwise"])),
    )


@settings(max_examples=40, deadline=None)
@given(steps())
def test_a_step_is_the_sum_of_its_parts_and_never_faster_than_the_peak(s: StepSettings) -> None:
    time = predict_step(s, H100, factor=1)
    assert all(part >= 0 for part in time.parts.values())
    assert sum(time.parts.values()) == pytest.approx(time.seconds)
    assert time.tokens_per_second == pytest.approx(s.tokens / time.seconds)
    assert time.tokens_per_second_per_gpu * 64 == pytest.approx(time.tokens_per_second)
    peak = H100.peaks[PRECISIONS[s.precision].peak]
    # Half of the counted attention is causal and not computed, the rest at most at the peak.
    counted = 12 * s.num_layers * s.seq_length * s.queries
    least = s.tokens * (s.flops_per_token - counted / 2) / 64 / peak
    assert time.seconds > least and 0 < time.mfu < 1


@settings(max_examples=20, deadline=None)
@given(
    steps(),
    st.sampled_from(
        ["memory_bandwidth", "nvlink_bandwidth", "network_bandwidth", "peaks", "nvlink_gpus"]
    ),
)
def test_a_better_accelerator_is_never_slower(s: StepSettings, name: str) -> None:
    value = getattr(H100, name)
    better = {k: 2 * v for k, v in value.items()} if name == "peaks" else 2 * value
    faster = predict_step(s, dataclasses.replace(H100, **{name: better})).seconds
    assert faster <= predict_step(s, H100).seconds * (1 + 1e-12)


@settings(max_examples=20, deadline=None)
@given(steps(), st.floats(1e-3, 1e3))
def test_a_calibrated_model_gives_the_measured_step(s: StepSettings, seconds: float) -> None:
    factor = calibration_factor(s, H100, seconds)
    assert predict_step(s, H100, factor).seconds == pytest.approx(seconds)


def test_the_products_of_a_layer_are_six_operations_per_element_of_its_matrices() -> None:
    s, free = step(1), dataclasses.replace(INSTANT, memory_bandwidth=1e30)
    times = LayerTimes(s, free, dataclasses.replace(NO_LATENCY, products=1, attention=1))
    layer = times.forward(PRECISIONS["bf16"]) + times.backward(PRECISIONS["bf16"])
    matrices = 1024 * (2 * 1024 + 2 * 256) + 3 * 1024 * 2816
    assert layer.products * 989.5e12 == pytest.approx(6 * matrices * 2 * 2048)
    # Forward 4 x head width x length / 2 (causal); backward has five products for its two.
    assert layer.attention * 989.5e12 == pytest.approx(3.5 * 2 * 1024 * 2048 * 2 * 2048)
    assert times.output_layer().products * 989.5e12 == pytest.approx(6 * 1024 * 1024 * 2 * 2048)


@pytest.mark.parametrize(("sequence_parallel", "volumes"), [(True, 10), (False, 8)])
def test_tensor_parallel_collectives_move_the_bytes_of_korthikanti(
    sequence_parallel: bool, volumes: int
) -> None:
    # Four all-reduces a layer, or four all-gathers and four reduce-scatters of the same volume
    # and two all-gathers for the weight gradients (arXiv 2205.05198, section 4.2.2).
    s = step(2, tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    times = LayerTimes(s, H100, dataclasses.replace(NO_LATENCY, links=1))
    layer = times.forward(PRECISIONS["bf16"]) + times.backward(PRECISIONS["bf16"])
    volume = 2 * 2048 * 1024 * 2 / 2  # bytes that one of two ranks receives
    assert layer.tensor_parallel * 450e9 == pytest.approx(volumes * volume)


def test_full_recomputation_adds_one_forward_pass_per_layer() -> None:
    uniform = {"recompute_granularity": "full", "recompute_method": "uniform"}
    plain, full = step(1), step(1, **uniform, recompute_num_layers=1)
    forward = LayerTimes(plain, H100).forward(PRECISIONS["bf16"]).total
    more = predict_step(full, H100, 1).seconds - predict_step(plain, H100, 1).seconds
    assert more == pytest.approx(24 * forward * plain.micro_batches)
    half = step(1, **uniform | {"recompute_method": "block"}, recompute_num_layers=12)
    assert predict_step(half, H100, 1).seconds - predict_step(plain, H100, 1).seconds == (
        pytest.approx(more / 2)
    )


@pytest.mark.parametrize("modules", [["core_attn"], ["mlp"], ["layernorm"]])
def test_selective_recomputation_costs_less_than_full(modules: list[str]) -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    most = predict_step(step(1, **full, recompute_num_layers=1), H100).seconds
    some = step(1, recompute_granularity="selective", recompute_modules=modules)
    assert predict_step(step(1), H100).seconds < predict_step(some, H100).seconds < most


def simulate(stages: list[tuple[float, float]], count: int) -> float:
    """The makespan of 1F1B over stages of (forward, backward) seconds."""
    pp = len(stages)
    queues = []
    for stage in range(pp):
        ahead = min(count, pp - stage - 1)
        order = [("f", i) for i in range(ahead)]
        for i in range(count - ahead):
            order += [("f", ahead + i), ("b", i)]
        queues.append(order + [("b", i) for i in range(count - ahead, count)])
    done: dict[tuple[str, int, int], float] = {}
    free = [0.0] * pp
    while any(queues):
        for stage, order in enumerate(queues):
            if not order:
                continue
            kind, i = order[0]
            needs = ("f", i, stage - 1) if kind == "f" else ("b", i, stage + 1)
            if kind == "b" and stage == pp - 1:
                needs = ("f", i, stage)
            if 0 <= needs[2] < pp and needs not in done:
                continue
            begin = max(free[stage], done.get(needs, 0.0))
            free[stage] = done[kind, i, stage] = begin + stages[stage][kind == "b"]
            order.pop(0)
    return max(free)


@pytest.mark.parametrize(
    ("layers", "last_is_slowest"),
    [((6, 6, 6, 6), True), ((5, 6, 6, 7), True), ((7, 6, 6, 5), False), ((3, 9, 6, 6), False)],
)
def test_the_pipeline_takes_as_long_as_simulated_1f1b(
    layers: tuple[int, ...], last_is_slowest: bool
) -> None:
    s = step(4, pipeline_model_parallel_size=4, global_batch_size=32)
    s = dataclasses.replace(s, stages=tuple((n, 0) for n in layers))
    times = LayerTimes(s, INSTANT, NO_LATENCY)
    forward = times.forward(PRECISIONS["bf16"]).total
    backward = times.backward(PRECISIONS["bf16"]).total
    stages = [(n * forward, n * backward) for n in layers]
    output = times.output_layer().total
    stages[-1] = (stages[-1][0] + output / 3, stages[-1][1] + output * 2 / 3)
    time = predict_step(s, INSTANT, 1, NO_LATENCY)
    computed = time.seconds - time.parts["optimizer"]
    simulated = simulate(stages, s.micro_batches)
    if last_is_slowest:  # as with equal layers: it has the output layer
        assert computed == pytest.approx(simulated, rel=0.001)
    else:
        assert simulated < computed < 1.05 * simulated


def test_data_parallel_collectives_are_exposed_without_overlap_only() -> None:
    plain = {"use_distributed_optimizer": True}
    slow = predict_step(step(64, **plain), H100, 1).parts["data_parallel"]
    hidden = step(64, **plain, overlap_grad_reduce=True, overlap_param_gather=True)
    parameters = step(64).stage_parameters[0]
    bandwidth = 0.75 * 400e9  # eight network ports of a node
    assert slow == pytest.approx(parameters * (4 + 2) * 63 / 64 / bandwidth)
    assert predict_step(hidden, H100, 1).parts["data_parallel"] == pytest.approx(slow / 10)
    assert predict_step(step(1), H100, 1).parts["data_parallel"] == 0


def test_a_group_uses_the_ports_of_its_members_in_a_node() -> None:
    assert H100.group_bandwidth(8, 1) == H100.group_bandwidth(2, 4) == 450e9
    assert H100.group_bandwidth(2, 8) == 50e9
    assert H100.group_bandwidth(16, 4) == 2 * 50e9
    assert H100.group_bandwidth(128, 1) == 8 * 50e9
    assert find_accelerator("gb200-nvl72").group_bandwidth(144, 1) == 900e9


def test_the_operations_are_those_of_log_throughput() -> None:
    config = cast(ResolvedConfig, small(8, LLAMA, bf16=True))
    assert step_settings_of(config, VOCAB, 8).flops_per_token == flops_per_token(config, VOCAB)


def test_every_number_of_the_data_file_has_a_source() -> None:
    file = Path(benchmark.__file__).parents[1] / "megatron_chatflow/planner/accelerators.yaml"
    for entry in load_yaml(file.read_text(encoding="utf-8")).values():
        assert set(entry["sources"]) == set(entry) - {"sources", "systems"}
        assert all("data sheet" in source for source in entry["sources"].values())


def test_an_unknown_accelerator_is_refused_with_the_nearest_and_all_known() -> None:
    assert find_accelerator("dgx-h100") is H100
    with pytest.raises(ConfigError, match="'H100' is unknown; did you mean H100-SXM") as error:
        find_accelerator("H100")
    assert all(name in str(error.value) for name in accelerators())
    with pytest.raises(ConfigError, match="unknown; the known ones are A100"):
        find_accelerator("abacus")


def test_a_precision_that_the_accelerator_lacks_is_refused() -> None:
    a100: Accelerator = find_accelerator("A100-SXM-80GB")
    with pytest.raises(ConfigError, match="A100-SXM-80GB has no fp8 products"):
        predict_step(step(8, precision="delayed"), a100)


PUBLISHED = """\
release,model,system,gpus,precision,gbs,mbs,sequence_length,fsdp,tp,pp,cp,vp,tokens_per_sec_per_gpu
26.04.01,LLAMA3_70B,DGX-GB300,64,MXFP8,256,1,8192,0,1,4,1,5,4864
26.04.01,LLAMA3.1_405B,DGX-GB300,256,MXFP8,1536,1,8192,0,2,8,2,4,960
26.04.01,LLAMA3_70B,DGX-GB200,64,NVFP4,256,1,8192,0,2,4,1,5,4864
26.04.01,LLAMA3.1_405B,DGX-GB200,256,NVFP4,1536,1,8192,0,4,16,1,8,1184
26.04.01,LLAMA3_70B,DGX-H100,64,FP8,256,1,8192,0,4,8,1,5,1664
26.04.01,LLAMA3.1_405B,DGX-H100,1024,FP8,1536,1,8192,0,8,8,2,8,328
"""


def test_a_70b_step_predicts_the_405b_step_of_the_same_system(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(PUBLISHED)
    rows = benchmark.read_rows(tmp_path / "rows.csv")
    found = benchmark.calibrated(benchmark.split(rows, benchmark.SPLITS["fewest GPUs, newest"]))
    assert [test.model for _, _, test in found] == ["LLAMA3.1_405B"] * 3
    assert all(abs(error) < 0.15 for error, _, _ in found)


BF16 = """\
release,model,system,gpus,precision,gbs,mbs,sequence_length,fsdp,tp,pp,cp,vp,tokens_per_sec_per_gpu
0,LLAMA3.1_405B,DGX-H100,8192,BF16,2048,1,8192,0,8,16,1,8,1
0,LLAMA3.1_405B,DGX-H100,16384,BF16,2048,1,8192,0,8,16,1,8,1
"""


def test_llama_3_in_bf16_is_predicted_from_data_sheets_alone(tmp_path: Path) -> None:
    # "The Llama 3 Herd of Models" (arXiv 2407.21783), table 4: another trainer, in a precision and
    # at sizes that no calibration row has. TFLOP/s per GPU count causal attention.
    (tmp_path / "rows.csv").write_text(BF16)
    rates = []
    for row in benchmark.read_rows(tmp_path / "rows.csv"):
        s = row.step
        causal = s.flops_per_token - 6 * s.num_layers * s.seq_length * s.queries
        rates.append(predict_step(s, H100).tokens_per_second_per_gpu * causal / 1e12)
    assert rates == [pytest.approx(430, rel=0.2), pytest.approx(400, rel=0.2)]
    assert rates[1] / rates[0] == pytest.approx(400 / 430, rel=0.03)


def test_the_benchmark_prints_a_table_and_one_json_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text(PUBLISHED)
    assert benchmark.main([str(tmp_path / "rows.csv"), "--rows"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 rows, 3 of them calibrate")
    result = json.loads(lines[-1])
    assert result["splits"]["every row"]["test"]["rows"] == 6
    assert result["not calibrated"]["rows"] == 3


@pytest.mark.skipif(
    "CHATFLOW_LAWS_DATA" not in os.environ, reason="CHATFLOW_LAWS_DATA names the folder of tables"
)
def test_published_rows_are_predicted_within_15_percent_on_average_in_every_split() -> None:
    folder = Path(os.environ["CHATFLOW_LAWS_DATA"])
    result = benchmark.evaluate(
        benchmark.read_rows(folder / "bridge_throughput_llama_pretrain.csv")
    )
    for name, parts in result["splits"].items():
        for kind in ("test", "other model"):
            summary = parts[kind]
            assert summary["mean"] <= 0.15 and summary["worst"] <= 0.30, (name, kind)
    # What `preflight --time` prints.
    assert result["default_factor"] == pytest.approx(DEFAULT_FACTOR, abs=0.005)
    every, none = result["splits"]["every row"]["test"], result["not calibrated"]
    for key, measured in (("calibrated", every), ("not calibrated", none)):
        for stated, found in zip(EXPECTED_ERROR[key], list(measured.values())[1:], strict=True):
            assert found <= stated < found + 0.01
