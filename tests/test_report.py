"""What the report of an export says first, and that its two forms say the same."""

import pytest

from elastic.report import Report, verdict


def entry(prefill=0.5, decode=0.8, control=0.01, trusted=True, **more) -> dict:
    return dict(
        path="there", bytes=3_000_000, max_abs_diff=1e-5, largest_logit=20.0,
        greedy_tokens_equal=True, prefill_ms=prefill * 40, decode_ms=decode * 10,
        full_prefill_ms=40.0, full_decode_ms=10.0 if decode else 0, prefill_ratio=prefill,
        decode_ratio=decode or 1.0, control=control, trusted=trusted, load_s=0.5, memory_mb=100.0,
        full_load_s=1.0, full_memory_mb=200.0, full_bytes=6_000_000, accuracy=0.75, accuracy_n=8,
        deployed={"precision": "bfloat16", "tokens": 32, "tokens_equal": 30, "max_abs_diff": 0.25},
        texts=["four", "five"], **more,
    )  # fmt: skip


SKIPPED = {"skipped": "no reason"}


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        ({"hf": entry(), "peft": SKIPPED},
         "Faster than the full model: hf (prefill 2.00x as fast, decode 1.25x as fast)"),
        ({"hf": entry(0.5, 0)}, "Faster than the full model: hf (prefill 2.00x as fast)"),
        # Both have to be faster, and by more than the full model differs from itself.
        ({"hf": entry(0.5, 1.25)},
         "NOT FASTER than the full model: hf (prefill 2.00x as fast, decode 0.80x as fast)"),
        ({"hf": entry(1.25, 0.5)},
         "NOT FASTER than the full model: hf (prefill 0.80x as fast, decode 2.00x as fast)"),
        ({"hf": entry(0.5, 0.992)},
         "NOT FASTER than the full model: hf (prefill 2.00x as fast, decode 1.01x as fast)"),
        ({"hf": entry(control=0.2, trusted=False)},
         "Not known to be faster than the full model, which timed twice disagrees: hf (it differs "
         "from itself by 20.0%)"),
        ({"hf": SKIPPED}, "Nothing was written that runs here"),
    ],
)  # fmt: skip
def test_the_verdict_on_one_format(formats, said):
    assert verdict(formats) == said


def test_the_verdict_begins_with_what_is_not_faster():
    formats = {"hf": entry(), "onnx": entry(0.9, 1.0), "peft": entry(trusted=False),
               "openvino": entry()}  # fmt: skip
    slow, unknown, fast = verdict(formats).split(". ")
    assert slow.startswith("NOT FASTER") and "onnx (" in slow
    assert unknown.startswith("Not known to be faster") and "peft (" in unknown
    assert fast.startswith("Faster") and "hf (" in fast and "openvino (" in fast


@pytest.fixture
def report(tmp_path) -> Report:
    formats = {
        "hf": entry(),
        "onnx": {**entry(control=0.5, trusted=False), "texts": ["four", "six\n|"]},
        "openvino": {**entry(), "load_s": None, "memory_mb": None, "accuracy": None},
        "peft": SKIPPED,
    }
    samples = [{"prompt": "x" * 500 + " two and two?", "answer": "4", "full": "four"},
               {"prompt": "two and three?", "answer": "5", "full": "fife"}]  # fmt: skip
    contents = dict(
        verdict=verdict(formats), name="small", params=5e7, full_params=1e8, macs=1, full_macs=4,
        accuracy=0.5, accuracy_interval=[0.4, 0.6], accuracy_n=80, formats=formats, samples=samples,
        timing={"batch": 1, "prompt_tokens": 64, "tolerance": 0.03},
    )  # fmt: skip
    return Report(tmp_path, contents)


def test_both_forms_begin_with_the_verdict_and_tell_everything(report, capsys):
    report.show()
    shown, written = capsys.readouterr().out, report.markdown()
    first = report.contents["verdict"]
    assert written.splitlines()[0] == first
    assert " ".join(shown.split()).startswith(first)
    for text in (shown, written):
        for told in (
            "50.0 M of 100.0 M parameters, 25% of the operations", "on 80 test examples",
            "3 / 6", "0.50 / 1.00", "100 / 200", "- / 200", "20.0 / 40.0", "8.0 / 10.0", "50.0%",
            "1.0e-05 of 20", "equal", "bfloat16", "30 of 32", "2.5e-01", "75.0% of 8",
            'wanted: "4"', 'full model, hf, onnx, openvino: "four"', 'full model: "fife"',
            'hf, openvino: "five"', r'onnx: "six\n|"', "... two and two?"[4:],
            "peft: not written: no reason", "too busy to trust these times",
        ):  # fmt: skip
            assert told in text, told
        assert "x" * 200 not in text
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert len(rows) == 2 * (2 + 3)
    assert {line.count("|") for line in rows[:5]} == {8}


def test_of_a_classifier_nothing_is_decoded(report, capsys):
    for found in report.contents["formats"].values():
        found |= {"decode_ms": 0, "full_decode_ms": 0}
    assert "decode" not in report.markdown().partition("\n")[2]
    assert "class" in report.markdown()
