"""What the report of an export says first, and that its two forms say the same."""

import re
from dataclasses import replace

import pytest

from elastic.config import ExportConfig, TrainConfig
from elastic.exporting.probes import Agreement
from elastic.exporting.proof import (
    Accuracy,
    Proof,
    Sample,
    Skipped,
    Trade,
    Unproved,
    Weighed,
)
from elastic.exporting.report import Model, Report, verdict
from elastic.latency.measure import Bounds, Latency, Measurement
from elastic.spaces.bound import SubAdapter
from elastic.supernet.cost import Cost
from elastic.supernet.held_out import Compensated


def timed(prefill=0.5, decode=0.8, control=0.01, full_prefill_ms=40.0, width=0.02) -> Measurement:
    """`width`: how far the bounds of a ratio are from it."""
    full = Latency(full_prefill_ms, 10.0 if decode else 0.0, 0.0)
    own = Latency(prefill * 40, decode * 10, 0.0)
    ratios = {"compact": Latency(prefill, decode or 1.0, 0.0)}
    bounds = {name: Bounds((r.prefill_ms - width, r.prefill_ms + width),
                           (r.decode_ms - width, r.decode_ms + width))
              for name, r in ratios.items()}  # fmt: skip
    return Measurement({"full": full, "compact": own}, control, 3, 0.03, ratios, bounds)


def entry(prefill=0.5, decode=0.8, control=0.01, width=0.02, **more) -> Proof:
    settings = dict(
        about={}, bytes=3_000_000, exact=Agreement(1e-5, 20.0, 32, 32, False),
        deployed=Agreement(0.25, 20.0, 32, 30, False), precision="bfloat16",
        timing=timed(prefill, decode, control, width=width),
        weighed=Weighed(0.5, 100.0, 1.0, 200.0, 6_000_000),
        texts=["four", "five"], as_torch=False,
        trade=Trade(Accuracy(0.75, 8, [0.409, 0.929]), Accuracy(0.875, 8, [0.529, 0.978]), -0.125,
                    [-0.37, 0.07]),
    )  # fmt: skip
    return Proof(**(settings | more))


SKIPPED = Skipped("no reason")


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        ({"hf": entry(), "peft": SKIPPED},
         "Faster than the full model: hf (prefill 2.00x as fast, decode 1.25x as fast)"),
        ({"hf": entry(0.5, 0)}, "Faster than the full model: hf (prefill 2.00x as fast)"),
        # Both have to be faster, with the whole of their intervals.
        ({"hf": entry(0.5, 1.25)},
         "NOT FASTER than the full model: hf (prefill 2.00x as fast, decode 0.80x as fast)"),
        ({"hf": entry(1.25, 0.5)},
         "NOT FASTER than the full model: hf (prefill 0.80x as fast, decode 2.00x as fast)"),
        ({"hf": entry(0.5, 0.992)},
         "Not known to be faster than the full model: hf (prefill 1.92x to 2.08x, decode 0.99x to "
         "1.03x)"),
        ({"hf": entry(0.5, 0.98, control=0.001, width=0.005)},
         "Faster than the full model: hf (prefill 2.00x as fast, decode 1.02x as fast)"),
        # Nor is it told by less than the full model differs from itself.
        ({"hf": entry(control=0.3)},
         "Not known to be faster than the full model: hf (it differs from itself by 30.0%)"),
        ({"hf": entry(control=0.2)},
         "Faster than the full model: hf (prefill 2.00x as fast, decode 1.25x as fast)"),
        ({"hf": SKIPPED}, "Nothing was written that runs here"),
    ],
)  # fmt: skip
def test_the_verdict_on_one_format(formats, said):
    assert verdict(formats) == said


def test_the_verdict_begins_with_what_is_not_faster():
    formats = {"hf": entry(), "onnx": entry(0.9, 1.1), "peft": entry(control=0.3),
               "openvino": entry()}  # fmt: skip
    slow, unknown, fast = verdict(formats).split(". ")
    assert slow.startswith("NOT FASTER") and "onnx (" in slow
    assert unknown.startswith("Not known to be faster") and "peft (" in unknown
    assert fast.startswith("Faster") and "hf (" in fast and "openvino (" in fast


@pytest.fixture
def report(tmp_path) -> Report:
    formats = {
        "hf": entry(),
        "onnx": entry(control=0.5, texts=["four", "six\n|"]),
        "openvino": entry(weighed=Weighed(None, None, 1.0, 200.0, 6_000_000), trade=Trade()),
        "peft": SKIPPED,
    }
    score = Accuracy(0.5, 80, [0.4, 0.6])
    return Report(
        directory=tmp_path,
        model=Model("small", SubAdapter(()), score, Cost(50_000_000, 1, 50_000_000),
        Cost(100_000_000, 4, 100_000_000),
                    Compensated(0.5, False, {"0": 2.5, "0.5": 2.25, "sequential": 2.375})),
        config=ExportConfig(), trained=TrainConfig(), formats=formats, origin={}, license=None,
        base_digest="", provenance={},
        samples=[Sample("x" * 500 + " two and two?", "4", "four"),
                 Sample("two and three?", "5", "fife")],
    )  # fmt: skip


def with_formats(report: Report, **settings) -> Report:
    """Every proof of it with these fields."""
    formats = {name: replace(found, **settings) if name in report.proved else found
               for name, found in report.formats.items()}  # fmt: skip
    return replace(report, formats=formats)


def test_both_forms_begin_with_the_verdict_and_tell_everything(report, capsys):
    report.show()
    shown, written = capsys.readouterr().out, report.markdown()
    first = report.contents["verdict"]
    assert written.splitlines()[0] == first
    assert " ".join(shown.split()).startswith(first)
    for text in (shown, written):
        for told in (
            "50.0 M of 100.0 M parameters, 25% of the operations",
            "50% of what is cut is made up for", "2.3750", "on 80 test examples",
            "75.0% [41, 93]", "87.5% [53, 98]", "-12.5 [-37, 7.0]", "hf, accuracy on 8 test",
            "20.0 (2.00x)", "40.0", "8.0 (1.25x)", "10.0", "50.0%", "0.50 / 1.00", "- / 1.00",
            "batch 1 and a prompt of 64 tokens", "1.0e-05 of 20", "equal", "bfloat16", "30 of 32",
            "2.5e-01",
            'wanted: "4"', 'full model, hf, onnx, openvino: "four"', 'full model: "fife"',
            'hf, openvino: "five"', r'onnx: "six\n|"', "... two and two?"[4:],
            "peft: not written: no reason", "too busy to trust these times",
        ):  # fmt: skip
            assert told in text, told
        assert "x" * 200 not in text
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert len(rows) == 3 * (2 + 2) + 2 + 3
    assert {line.count("|") for line in rows[:4]} == {9}


def trade(report: Report, runtime: str) -> list[list[str]]:
    """The cells of one runtime's table, heads first."""
    _, _, rest = report.markdown().partition(f"\n{runtime}")
    lines = rest.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[2] != "-"
    ]


def test_the_trade_has_a_row_for_every_precision_in_its_runtime(report, capsys):
    """Each by its own figures, and the full model by those it had beside the plain one."""
    whole = Accuracy(0.875, 8, [0.529, 0.978])
    int8 = entry(
        timing=timed(0.25, 0.4, 0.02, full_prefill_ms=44.4), bytes=1_000_000,
        weighed=Weighed(0.5, 50.0, 1.0, 200.0, 6_000_000),
        trade=Trade(Accuracy(0.5, 8, [0.2, 0.8]), whole, -0.375, [-0.6, -0.1]),
    )  # fmt: skip
    compressed = {"onnx-int8": int8, "onnx-int4_awq": entry(5.0, 2.0)}
    report = replace(report, formats={**report.formats, **compressed})
    assert trade(report, "onnx, accuracy on 8 test examples") == [
        ["", "accuracy [95%]", "difference from full [95%]", "size MB", "memory MB",
         "prefill ms (speed-up)", "decode ms (speed-up)", "A/A control"],
        ["full", "87.5% [53, 98]", "", "6", "200", "40.0", "10.0", ""],
        ["compact", "75.0% [41, 93]", "-12.5 [-37, 7.0]", "3", "100", "20.0 (2.00x)",
         "8.0 (1.25x)", "50.0%"],
        ["+ int8", "50.0% [20, 80]", "-37.5 [-60, -10]", "1", "50", "10.0 (4.00x)",
         "4.0 (2.50x)", "2.0%"],
        ["+ int4_awq", "75.0% [41, 93]", "-12.5 [-37, 7.0]", "3", "100", "200.0 (0.20x)",
         "20.0 (0.50x)", "1.0%"],
    ]  # fmt: skip
    report.show()  # 110 wide: no cell is broken
    rows = [re.split(r" *[│┃] *", line) for line in capsys.readouterr().out.splitlines()]
    for row in trade(report, "onnx")[1:]:
        assert ["", *row, ""] in rows


def test_what_nobody_asked_for_has_no_column(report):
    """`--runtime_examples 0`, `--weigh false`, and where decoding means nothing."""
    heads, full, compact = trade(report, "openvino")
    assert heads[1:3] == ["size MB", "memory MB"] and full[2] == "200" and compact[2] == "-"
    report = with_formats(report, weighed=Weighed(full_bytes=6_000_000), timing=timed(decode=0))
    assert trade(report, "openvino")[0] == ["", "size MB", "prefill ms (speed-up)", "A/A control"]


def test_of_a_classifier_nothing_is_decoded(report, capsys):
    report = with_formats(report, timing=timed(decode=0))
    assert "decode" not in report.markdown().partition("\n")[2]
    assert "class" in report.markdown()


def test_the_file_has_every_known_figure_under_its_name(report):
    formats = {"gguf": Unproved(5, "not run"), "peft": SKIPPED, "hf": entry(as_torch=True)}
    told = replace(report, formats=formats).contents["formats"]
    assert told["gguf"] == {"path": str(report.directory / "gguf"), "bytes": 5,
                            "unproved": "not run"}  # fmt: skip
    assert told["peft"] == {"skipped": "no reason"}
    figures = {
        "prefill_ms": 20.0, "full_decode_ms": 10.0, "prefill_ratio": 0.5, "control": 0.01,
        "trusted": True, "full_memory_mb": 200.0, "accuracy": 0.75, "full_accuracy_n": 8,
        "difference": -0.125,
    }  # fmt: skip
    assert {name: told["hf"][name] for name in figures} == figures
    unasked = entry(weighed=Weighed(), trade=Trade()).as_dict()
    assert unasked["accuracy"] is None and unasked["full_load_s"] is None
    assert not {"full_bytes", "unanswered", "full_unanswered"} & set(unasked)
    broken = replace(entry().deployed, max_abs_diff=float("nan"))
    assert entry(deployed=broken).as_dict()["deployed"]["max_abs_diff"] is None  # JSON has no NaN
