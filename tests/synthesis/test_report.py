"""What a finished run says about itself: nothing that was not done, and the balance of what was."""

import json
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tests.docs.markdown import ROOT
from tests.synthesis.runs import check_complete, written
from tests.synthesis.test_drawn import RECORDS, synthesize

from fusion_hf.common.errors import InputError
from fusion_hf.synthesis.data_card import SIDE, Sample, contact_page, write_card
from fusion_hf.synthesis.pipeline import begin, decisive
from fusion_hf.synthesis.run_config import SynthesisConfig, load_config
from fusion_hf.synthesis.run_report import MakeReport, finished_report, make_report
from fusion_hf.synthesis.summary import Summary
from fusion_hf.synthesis.synth_record import RecordTurn, SynthRecord

MIX = ROOT / "configs" / "synthesis" / "mix.yaml"
ENDPOINT = "{model: judge, url: 'http://localhost:1'}"
MODEL_STEPS = {"describe", "write_qa", "make_image"}
CHECKS = {"judge", "image_check"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a run without a model; no record of it is rejected."""
    return synthesize(tmp_path_factory.mktemp("drawn") / "run", executor={"tasks": 8})


def summary_of(*records: SynthRecord) -> Summary:
    summary = Summary()
    for record in records:
        summary.add(record, {})
    return Summary.from_dict(json.loads(json.dumps(summary.to_dict())))


def record(number: int, *turns: tuple[str, str]) -> SynthRecord:
    texts = turns or (("What color is it?", "Red"),)
    return SynthRecord(
        str(number), "SynthColor", "", 0, ("a",), ("a.png",), tuple(RecordTurn(*turn) for turn in texts)
    )


def card_of(config: SynthesisConfig, summary: Summary, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    write_card(folder, make_report(config, summary), Summary(), [], config.format)
    return (folder / "README.md").read_text()


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def steps_of(report: dict, category: str = "SynthColor") -> dict[str, dict]:
    return {step["step"]: step for step in report["categories"][category]["yields"]}


def test_what_did_not_run_has_no_yield(drawn: Path):
    card = (drawn / "README.md").read_text()
    steps = steps_of(finished_report(drawn))
    for name in MODEL_STEPS | CHECKS:
        assert (steps[name]["ran"], steps[name]["came"], steps[name]["kept_share"]) == (False, 0, None)
        assert f"| SynthColor | {name} |  |  | not run |" in card
    assert steps["colors"]["ran"] and steps["colors"]["kept_share"] == 1.0
    assert re.search(r"\| SynthColor \| colors \| \d+ \| 0 \| 100.0% \|", card)


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        ([], CHECKS),
        ([f"judge={ENDPOINT}"], {"image_check"}),
        (["image_check={fusion: nano}"], {"judge"}),
        ([f"judge={ENDPOINT}", f"image_check={{endpoint: {ENDPOINT}}}"], set()),
        (["backend=procedural", f"judge={ENDPOINT}"], CHECKS | MODEL_STEPS),
    ],
)
def test_steps_of_a_config(overrides: list[str], idle: set[str]):
    report = make_report(load_config(MIX, overrides), summary_of(record(0)))
    assert {name for name, step in steps_of(report).items() if not step["ran"]} == idle


def test_a_step_that_no_record_reached_keeps_no_share(tmp_path: Path):
    summary = summary_of(record(0).rejected("describe", "refused"))
    config = load_config(MIX, [f"judge={ENDPOINT}"])
    steps = steps_of(make_report(config, summary))
    assert steps["describe"]["kept_share"] == 0.0
    assert steps["judge"]["ran"] and steps["judge"]["kept_share"] is None
    assert "| SynthColor | judge | 0 | 0 | no records |" in card_of(config, summary, tmp_path)


def test_the_licence_is_stated(drawn: Path, tmp_path: Path):
    card = (drawn / "README.md").read_text()
    assert header(card)["license"] == "apache-2.0" and "`license` of the config" in card
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    unknown = card_of(load_config(MIX), summary_of(record(0)), tmp_path / "unknown")
    assert header(unknown)["license"] == "unknown" and "To be stated by you" in unknown
    for overrides in (["license=cc0-1.0"], ["license=cc0-1.0", "backend=procedural"]):
        stated = card_of(load_config(MIX, overrides), summary_of(record(0)), tmp_path / str(len(overrides)))
        assert header(stated)["license"] == "cc0-1.0" and "To be stated" not in stated and "apache" not in stated


@pytest.mark.parametrize("value", ["My own license", "MIT\nx: y", "", 3])
def test_other_licences_are_refused(value: object):
    with pytest.raises(InputError, match=r"license.*(an identifier|text)"):
        load_config(MIX, [f"license={json.dumps(value)}"])


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path):
    """Its settings have no licence, its summaries no answers, and its tasks have left files without a record."""
    config = load_config(MIX, [f"output={tmp_path}", "license=cc0-1.0"])
    assert not any("license" in name for name in decisive(config))
    begin(load_config(MIX, [f"output={tmp_path}"]))
    begin(config)
    data, work = tmp_path / "data", tmp_path / "work"
    before = summary_of(record(0)).to_dict()
    del before["categories"]["SynthColor"]["answers"]
    (work / "summaries").mkdir(parents=True)
    (work / "summaries" / "00000.json").write_text(json.dumps(before))
    (work / "summaries" / "00001.json").write_text(json.dumps(summary_of(record(1)).to_dict()))
    (data / "rejected").mkdir(parents=True)
    (data / "rejected" / "00000.jsonl").touch()
    (data / "rejected" / "00001.jsonl").write_text("{}\n")
    assert list(MakeReport(config).run()) == []
    report = finished_report(data)
    assert report["written"] == 2 and report["license"] == "cc0-1.0"
    assert report["categories"]["SynthColor"]["answers"] == {"what color is": {"red": 1}}
    assert [path.name for path in (data / "rejected").iterdir()] == ["00001.jsonl"]


def test_only_tasks_that_reject_leave_a_file(drawn: Path):
    check_complete(drawn, RECORDS)
    assert len(written(drawn)) == RECORDS
    assert not list(drawn.glob("rejected/*"))
    assert "None was rejected" in (drawn / "README.md").read_text()


def test_a_draft_of_a_killed_task_goes_away(tmp_path: Path):
    draft = tmp_path / "run" / "data" / "rejected" / "00001.jsonl.draft"
    draft.parent.mkdir(parents=True)
    draft.write_text("half a rec")
    check_complete(synthesize(tmp_path / "run"), RECORDS)


def test_the_report_shows_the_balance(drawn: Path, tmp_path: Path):
    categories = finished_report(drawn)["categories"]
    for name, counts in categories.items():
        assert sum(sum(values.values()) for values in counts["answers"].values()) == counts["turns"], name
    assert set(categories["SynthCount"]["answers"]) == {"how many"}
    card = (drawn / "README.md").read_text()
    assert "## Balance of the answers" in card and "| SynthCount | how many |" in card
    turns = [("Is there a dog?", answer) for answer in ("Yes", "No", "No", "No.")]
    card = card_of(load_config(MIX), summary_of(*(record(index, turn) for index, turn in enumerate(turns))), tmp_path)
    assert "| SynthColor | is there | 4 | no 75.0%, yes 25.0% |" in card


def test_the_page_shows_each_image_beside_its_questions(drawn: Path):
    page = (drawn / "contact_sheet.html").read_text()
    assert "<image>" not in page and "&lt;image&gt;" not in page
    _, *parts = page.split("<h2>")
    assert len(parts) == sum(min(counts["written"], 4) for counts in finished_report(drawn)["categories"].values())
    for part in parts:
        ((source, name),) = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">', part)
        assert part.startswith(f"{name.rsplit('-', 2)[0]}: {name}</h2>") and "<dt>" in part and "<dd>" in part
        with Image.open(BytesIO(b64decode(source))) as image:
            assert max(image.size) == SIDE
    (policy,) = re.findall('Content-Security-Policy" content="([^"]+)"', page)
    assert "img-src data:" in policy and "default-src 'none'" in policy


def test_the_page_is_text_of_strangers():
    turns = [
        {"from": "human", "value": "<image>\n<script>alert(1)</script> & which?\nA. <b>\nB. <i>"},
        {"from": "gpt", "value": "</dl></section><img src=x>"},
    ]
    sample = Sample("SynthText", {"id": '"><b>', "conversations": turns}, Image.new("RGB", (8, 8)))
    page = contact_page([sample])
    assert page.count("<img") == 1 and "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; which?\nA. &lt;b&gt;\nB. " in page
    assert "white-space:pre-line" in page  # options stand one a line
