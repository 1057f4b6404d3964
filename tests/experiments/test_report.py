"""The report: everything is in the page, nothing is fetched, a bad file is named and left out."""

import copy
import html.parser
import json
import random
import re

import pytest

from experiments import launch
from experiments.framework.results import environment, validate_result, write_result
from experiments.report import page
from experiments.report.report import read_results, render
from experiments.speed.best_when import best_when, ratio_words

PIXEL = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f64540"
    "0000000049454e44ae426082"
)


def result(experiment, rows=(), files=(), **more):
    return {
        "schema_version": 1,
        "experiment": experiment,
        "passed": True,
        "summary": f"{experiment} found <this> & that",
        "started": "2026-11-21T12:00:00+00:00",
        "duration_s": 1.5,
        "options": {"seed": 0, "checkpoint": "a<b"},
        "environment": environment(),
        "rows": list(rows),
        "files": list(files),
        **more,
    }


def bench_row(name, us, **columns):
    shape = {"batch": 64, "dtype": "bf16", "heads": 128, "s_q": 1, "page_size": 64,
             "lengths": "uniform", "kv_len": 4096}  # fmt: skip
    return {**shape, "implementation": name, "status": "measured", "session": 0, "us": us,
            "error": 2e-3, "device": "NVIDIA H200", **columns}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Results of three experiments and of an earlier report."""
    found = tmp_path / "results"
    session = {"started": "2026-11-21T12:00:00+00:00", "ceilings": {"copy": 4000.0, "read": 4300.0},
               "environment": {**environment(), "devices": ["NVIDIA H200"]}}  # fmt: skip
    rows = [
        bench_row("hopper", 100.0, peer_us=95.0, of_ceiling=0.5),
        bench_row("jnp", 450.0),
        bench_row("flashinfer_fa3", 90.0),
        {**bench_row("hopper", None, kv_len=65536), "status": "skipped", "reason": "too <large>"},
    ]
    write_result(found / "benchmark" / "result.json", result("benchmark", rows, sessions=[session]))
    gantt = result("pipeline", [{"schedule": "seesaw", "us": 3.0}], ["pipeline.png", "trace.json"],
                   report=["bound by memory"], engine_share={"cube": 0.5})  # fmt: skip
    write_result(found / "a" / "pipeline" / "result.json", gantt)
    (found / "a" / "pipeline" / "pipeline.png").write_bytes(PIXEL)
    exact = [{"way": way, "error": 10.0**-i} for i, way in enumerate(("naive", "absorbed"), 3)]
    write_result(found / "parity" / "result.json", result("parity", exact))
    write_result(found / "report" / "result.json", result("report"))
    return found


def run(tmp_path, folder):
    arguments = ["--experiment=report", f"--results={folder}", f"--output_dir={tmp_path / 'out'}"]
    status = launch.main(["launch", *arguments])
    path = tmp_path / "out" / "report" / "report.html"
    return status, path.read_text() if path.exists() else None


def mutated(valid, rng):
    """The JSON of a result with one value replaced or gone, or with its bytes cut or changed."""
    numbers = (3, -1, 1e308, 10**400, float("nan"), float("-inf"), True, None)
    words = ("", "x", "y" * 10_000, "../x.png", "\ud800")
    odd = (*numbers, *words, [], {}, [3], [[]], [None], {"jax": 3}, {"a": {"b": []}})
    kind = rng.random()
    if kind < 0.15:
        data = bytearray(json.dumps(valid).encode())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.randrange(len(data)) if kind < 0.05 else None])
    content = copy.deepcopy(valid)
    places, queue = [], [content]
    while queue:
        inner = queue.pop()
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            queue += [inner[key]] if isinstance(inner[key], dict | list) else []
    inner, key = rng.choice(places)
    if kind < 0.3:
        del inner[key]
    else:
        inner[key] = rng.choice(odd)
    return json.dumps(content).encode()


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, open elements, text."""

    EMPTY = ("meta", "img", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.stack = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.stack):
            self.words.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


class TestPage:
    def test_holds_all_results_and_refers_to_nothing_outside(self, tmp_path, folder):
        status, text = run(tmp_path, folder)
        assert status == 0
        reader = Reader(text)
        assert reader.stack == []
        ids = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
        links = [attributes["href"] for attributes in reader.of("a")]
        assert len(links) > 5
        assert {link.removeprefix("#") for link in links} <= ids
        assert [image["src"][:22] for image in reader.of("img")] == ["data:image/png;base64,"]
        assert not reader.of("link")
        assert [set(attributes) for attributes in reader.of("script")] == [set()]
        assert not re.search(r"https?:|//\w|url\(|@import|fetch\(", text)
        assert "default-src 'none'" in reader.of("meta")[1]["content"]
        words = " ".join(reader.words)
        for said in ("a/pipeline", "parity found <this> & that", "bound by memory", "NVIDIA H200",
                     "too <large>", "What is best when", "a<b", "cube 0.5"):  # fmt: skip
            assert said in words, said
        assert "r-report" not in ids
        validate_result(json.loads((tmp_path / "out" / "report" / "result.json").read_text()))

    def test_says_who_is_best_and_the_largest_errors(self, tmp_path, folder):
        _, text = run(tmp_path, folder)
        best = text[text.index('id="what-is-best-when"') : text.index('id="errors-')]
        cells = re.findall(r"<td[^>]*>([^<]*)</td>", best)
        assert cells[-4:] == ["flashinfer_fa3", "0.90", "4.50", "50"]
        errors = text[text.index('id="errors-') : text.index('id="speed"')]
        assert re.search(r"parity</a></td>.*1\.0e-03", errors)

    def test_each_bad_file_is_named_and_left_out(self, tmp_path, folder, capsys):
        (folder / "a" / "pipeline" / "pipeline.png").unlink()
        (folder / "broken").mkdir()
        (folder / "broken" / "result.json").write_text('{"schema')
        write_result(folder / "old" / "result.json", result("soak"))
        old = json.loads((folder / "old" / "result.json").read_text())
        (folder / "old" / "result.json").write_text(json.dumps(old | {"schema_version": 7}))
        (folder / "folder" / "result.json").mkdir(parents=True)
        status, text = run(tmp_path, folder)
        assert status == 0
        reasons = {
            "a/pipeline/result.json": "names pictures that are not there: pipeline.png",
            "broken/result.json": "Unterminated string",
            "folder/result.json": "is not a file",
            "old/result.json": "schema_version must be 1",
        }
        said = capsys.readouterr().err
        found = json.loads((tmp_path / "out" / "report" / "result.json").read_text())
        lines = [f"{row['file']}: {row['reason']}" for row in found["left_out"]]
        for line, (name, reason) in zip(lines, reasons.items(), strict=True):
            assert line.startswith(f"{folder / name}: ")
            assert reason in line
            assert f"left out: {line}\n" in said
            assert name in text[text.index('id="left-out"') :]
        assert [row["name"] for row in found["rows"]] == ["benchmark", "parity"]

    def test_nothing_outside_a_results_folder_is_read(self, tmp_path, folder):
        secret = tmp_path / "secret.png"
        secret.write_bytes(PIXEL)
        names = {"absolute": str(secret), "up": "../pipeline/../../../secret.png", "link": "l.png",
                 "linked": "sub/secret.png"}  # fmt: skip
        for name, file in names.items():
            write_result(folder / name / "result.json", result("soak", files=[file]))
        (folder / "link" / "l.png").symlink_to(secret)
        (folder / "linked" / "sub").symlink_to(tmp_path)
        (tmp_path / "result.json").write_text(json.dumps(result("soak")))
        (folder / "other").mkdir()
        (folder / "other" / "result.json").symlink_to(tmp_path / "result.json")
        left_out = []
        found = read_results(folder, left_out)
        assert [r.name for r in found] == ["a/pipeline", "benchmark", "parity"]
        assert len(left_out) == 5
        assert all("outside" in row["reason"] or "leads out" in row["reason"] for row in left_out)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"sessions": 3}, "sessions must be a list, got 3"),
            ({"sessions": [{"started": 1}]}, "sessions[0].started must be"),
            ({"files": [3]}, "files[0] must be a name, got 3"),
            ({"environment": {"versions": {"jax": 3}}}, "environment.versions.jax must be"),
            ({"environment": {"devices": [None]}}, "environment.devices[0] must be"),
            ({"rows": [{"error": float("nan")}]}, "NaN"),
            ({"rows": [{"error": 1e999}]}, "Infinity is not JSON"),
            ({"files": ["picture.png"]}, "not a whole PNG"),
            ({"more": 10**400}, "more must be an integer of 64 bits"),
            ({"more": "\ud800"}, "more holds half a character"),
            ({"experiment": "benchmark", "rows": [{"us": 1.0}]}, "rows[0]: batch must be"),
            ({"experiment": "benchmark", "rows": [bench_row("xla", "1")]}, "us of a measured row"),
            (
                {"experiment": "benchmark", "rows": [bench_row("xla", 1.0)], "sessions": []},
                "rows[0]: session must be one of 0",
            ),
        ],
    )
    def test_one_odd_file_is_named_and_the_others_are_there(self, folder, change, named):
        odd = result("soak")
        odd["environment"] = odd["environment"] | change.get("environment", {})
        odd |= {key: value for key, value in change.items() if key != "environment"}
        (folder / "odd").mkdir()
        (folder / "odd" / "picture.png").write_bytes(b"\x89PNG")
        (folder / "odd" / "result.json").write_text(json.dumps(odd))
        left_out = []
        assert len(read_results(folder, left_out)) == 3
        (row,) = left_out
        assert row["file"] == str(folder / "odd" / "result.json")
        assert named in row["reason"]

    @pytest.mark.parametrize("depth", [40, 900, 100_000])
    def test_deep_json_is_named(self, folder, depth):
        text = json.dumps(result("soak", deep="here")).replace('"here"', "[" * depth + "]" * depth)
        (folder / "deep").mkdir()
        (folder / "deep" / "result.json").write_text(text)
        left_out = []
        assert len(read_results(folder, left_out)) == 3
        assert len(left_out) == 1
        assert "deep" in left_out[0]["file"]

    def test_whatever_a_file_holds_the_others_are_shown(self, tmp_path):
        """200 random changes of a valid file: each is shown or named, and ends nothing."""
        rng = random.Random(0)
        session = {"started": "2026-11-21", "ceilings": {"read": 4300.0},
                   "environment": environment()}  # fmt: skip
        rows = [bench_row("hopper", 100.0, peer_us=95.0, of_ceiling=0.5), bench_row("jnp", 450.0),
                {**bench_row("xla", None), "status": "skipped", "reason": "slow"}]  # fmt: skip
        valid = result("benchmark", rows, ["a.png"], sessions=[session], steps={"a": 1.0},
                       tables=[{"x": 1, "y": "z"}], left=0)  # fmt: skip
        write_result(tmp_path / "good" / "result.json", result("parity", [{"error": 1e-3}]))
        path = tmp_path / "odd" / "result.json"
        write_result(path, valid)
        (tmp_path / "odd" / "a.png").write_bytes(PIXEL)
        assert len(read_results(tmp_path)) == 2
        named = 0
        for _ in range(200):
            path.write_bytes(mutated(valid, rng))
            left_out = []
            found = read_results(tmp_path, left_out)
            names = ["good"] if left_out else ["good", "odd"]
            assert [r.name for r in found] == names
            assert [row["file"] for row in left_out] == [str(path)] * len(left_out)
            render(found, "title", left_out).encode()
            named += len(left_out)
        assert 50 < named < 190  # some changes are harmless

    def test_a_share_of_a_ceiling_that_is_none_is_not_shown(self, folder):
        row = bench_row("xla", 1.0, of_ceiling=1.65, of_read=1.65, of_matmul=0.1)
        write_result(folder / "cpu" / "result.json", result("benchmark", [row], sessions=[
            {"started": "x", "ceilings": {}, "environment": environment()}]))  # fmt: skip
        assert "165" not in render(read_results(folder / "cpu"), "cpu")

    def test_a_folder_without_results_is_named(self, tmp_path, capsys):
        assert run(tmp_path, tmp_path / "nothing") == (2, None)
        assert "no result.json under" in capsys.readouterr().err

    def test_a_folder_of_one_result_is_named_by_its_experiment(self, folder):
        assert [r.name for r in read_results(folder / "parity")] == ["parity"]


class TestTable:
    def test_sorts_by_number_and_says_once_what_all_rows_share(self):
        rows = [{"name": f"n{i}", "us": 1000.0 * i, "same": 7, "none": None} for i in range(3)]
        text = page.table(rows)
        assert "In all 3 rows: same 7." in text
        assert re.findall(r'data-v="([^"]*)">([^<]*)', text) == [
            ("0.0", "0"), ("1000.0", "1,000"), ("2000.0", "2,000"),
        ]  # fmt: skip
        assert "none" not in text
        assert "filter" not in text
        assert "filter" in page.table([{"a": i} for i in range(12)])
        assert page.table([]) == ""

    def test_text_is_escaped(self):
        text = page.table([{"<a>": "<b>&"}, {"<a>": page.Link("<c>", '"x')}])
        assert "&lt;a&gt;" in text
        assert "&lt;b&gt;&amp;" in text
        assert '<a href="#&quot;x">&lt;c&gt;</a>' in text

    @pytest.mark.parametrize(
        ("value", "words"),
        [(1.234e-3, "1.2e-03"), (0.0, "0"), (0.1234, "0.123"), (12345.6, "12,346"), (150.04, "150"),
         (True, "yes"), (65536, "65,536"), (None, ""), (float("nan"), "nan")],
    )  # fmt: skip
    def test_numbers_are_short(self, value, words):
        assert page.text(value) == words


class TestBestWhen:
    def test_classes_have_means_of_ratios(self):
        rows = [
            bench_row("hopper", 100.0, peer_us=80.0, of_ceiling=0.4),
            bench_row("jnp", 400.0),
            bench_row("hopper", 50.0, batch=128, peer_us=160.0, of_ceiling=0.6),
            bench_row("jnp", 40.0, batch=128),
            bench_row("xla", 9.0, kv_len=16384),
            {**bench_row("xla", None, batch=1), "status": "failed"},
        ]
        first, second = best_when(rows)
        assert (first["requests"], first["context"], first["shapes"]) == (
            "32 or more", "below 8192", 2,
        )  # fmt: skip
        assert first["fastest"] == "hopper 1, jnp 1"
        assert first["ours against the best peer"] == "1.60 (0.80 to 3.20)"
        assert first["ours against jnp under XLA"] == "1.79 (0.80 to 4.00)"
        assert first["of the ceiling, %"] == pytest.approx(50)
        assert (second["context"], second["fastest"]) == ("8192 or more", "xla")
        assert second["ours against the best peer"] == ""
        assert ratio_words([2.0]) == "2.00"

    def test_what_only_peers_and_xla_ran_has_no_ratio(self):
        (line,) = best_when([bench_row("jnp", 4.0), bench_row("flashinfer_fa2", 2.0)])
        assert line["fastest"] == "flashinfer_fa2"
        assert line["ours against jnp under XLA"] == ""
