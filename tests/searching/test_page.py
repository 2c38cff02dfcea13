"""report.html holds the whole search, needs nothing beside itself, and shows what is asked for."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from elastic.config import BudgetConfig
from elastic.run import Run
from elastic.searching.page import _volumes, write_page
from elastic.searching.study import search
from elastic.supernet.store import load_run
from tests.helpers.searches import CHROMIUM, config, data_of, shown_by_browser
from tests.helpers.tiny_runs import copy_run

pytestmark = pytest.mark.usefixtures("fake_latency")


@pytest.fixture(scope="module")
def searched(trained, fake_latency, tmp_path_factory):
    run = copy_run(trained, tmp_path_factory.mktemp("page") / "a <b>&amp; run")
    budget = BudgetConfig(prefill_ms="90%", max_accuracy_drop=0.3)
    return run, search(config(run, trials=12, starts=6, budget=budget, test_front=3))


def as_sub_adapter(data: dict, trial: dict) -> dict:
    return dict(zip(data["names"], trial["sizes"], strict=True))


def test_the_page_holds_the_whole_search(searched):
    run, front = searched
    data = data_of(run)
    assert [as_sub_adapter(data, trial) for trial in data["trials"]] == [
        one.sub_adapter.as_dict() for one in front.trials
    ]
    for trial, one in zip(data["trials"], front.trials, strict=True):
        assert (trial["estimate"], trial["feasible"]) == (one.estimate, one.feasible)
        assert one.figures.numbers().items() <= trial.items()
    names = {member.name: member for member in front.members}
    assert {member["name"] for member in data["members"]} == set(names)
    for member in data["members"]:
        theirs = names[member["name"]]
        assert as_sub_adapter(data, data["trials"][member["trial"]]) == theirs.sub_adapter.as_dict()
        assert member["accuracy"] == theirs.test["accuracy"]
        whole = front.best.full_test.accuracy
        gap, worst, most = member["from_full"]
        assert gap == pytest.approx(member["accuracy"] - whole) and worst <= gap <= most
        assert f"and {whole:.1%} on test" in data["about"]
        assert member["head"] is None
    assert data["limits"] == dict(front.limits) and data["head"] is None


def test_every_group_has_its_place_in_the_heat_map(searched):
    run, _ = searched
    data, space = data_of(run), load_run(run)[2].space
    placed = {group["name"]: group["full"] for group in data["groups"].values()}
    assert placed == {group.name: group.choices[0] for group in space}
    assert {tuple(key.split(" ", 1)) for key in data["groups"]} <= {
        (kind, block) for kind in data["kinds"] for block in data["blocks"]
    }
    assert data["names"] == [group.name for group in space]
    assert len(data["costs"]) == len(data["names"])


def test_the_hypervolume_never_shrinks(searched):
    _, front = searched
    volumes = _volumes(front.trials, front.costs[0])
    assert volumes == sorted(volumes) and volumes[-1] == 1 and len(volumes) == 12


def test_the_page_needs_nothing_beside_itself(searched):
    """No file, no network; and a name with markup in it stays a name."""
    page = searched[0].report.read_text()
    own = page.replace(re.search(r"<script>.*?</script>", page, re.S)[0], "")  # plotly.js
    assert not re.search(r"(src|href)\s*=|https?://|@import|fetch\(", own)
    assert page.count("</script>") == 3


def test_no_text_of_a_search_is_part_of_the_page(searched, tmp_path):
    """Such as a run named <!--<script>, which hides the end of its element from a browser."""
    run = Run(tmp_path / "<!--<script>")
    write_page(replace(searched[1], run=run))
    page = run.report.read_text()
    data = page[page.index('<script id="data"') + 1 :].partition("</script>")[0]
    assert "<" not in data
    assert data_of(run)["title"].startswith("<!--<script>")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("wanted", ["", "#front-1", "#3"])
def test_a_browser_shows_the_sub_adapter_asked_for(searched, tmp_path, wanted):
    run, front = searched
    shown = shown_by_browser(run, tmp_path, wanted)
    member = {"": front.best, "#front-1": front.members[0]}.get(wanted)
    sub = member.sub_adapter if member else front.trials[3].sub_adapter
    text = re.search(r'<pre id="json">(.*?)</pre>', shown, re.S)[1]
    assert json.loads(text) == {"sub_adapter": sub.as_dict()}
    if member:
        assert f'<h2 id="name">{member.name}</h2>' in shown
    assert "a &lt;b&gt;&amp;amp; run: 12 sub-adapters" in shown
    assert len(re.findall(r'<tr data-trial="\d+"', shown)) == len(front.members)
    assert re.search(r'<div[^>]* id="heads"[^>]* hidden=""', shown), "no head is cut"
    for plot in ("front", "sizes", "volume", "costs"):
        drawn = re.search(rf'<div id="{plot}" class="[^"]*js-plotly-plot', shown)
        assert drawn, plot
