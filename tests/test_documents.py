"""The documents: their form, their links, and their figures, each against the file that it comes from."""

import json
import re
import statistics
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from quant import export
from tests.helpers import ROOT, read_csv
from utils.checkpoint import load_checkpoint, model_from_checkpoint

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
DOCUMENTS += [ROOT / "results/README.md"]
BITS = ["32", "8", "6", "5", "4", "3", "2"]
AS_TRAINED, ONCE, EACH = "network, as trained", "batch norm re-estimated once", "re-estimated for each column"


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def tables(text: str) -> Iterator[list[list[str]]]:
    """Each table as its rows of cells, the head first."""
    for block in re.findall(r"(?:^\|.*\n)+", without_code(text), flags=re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        yield [rows[0], *rows[2:]]


def results_below(folder: Path) -> list[dict[str, str]]:
    return [row for path in sorted(folder.rglob("results.csv")) for row in read_csv(path)]


def test_form_of_the_readme():
    """It is read in two minutes: 200 lines, tables of 8 rows, paragraphs of 4 lines."""
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 200
    assert all(len(table) - 1 <= 8 for table in tables(readme))
    for paragraph in re.split(r"\n\n|\n(?=- )", without_code(readme)):
        assert paragraph.startswith("|") or len(paragraph.strip().splitlines()) <= 4, paragraph


def anchors(document: Path) -> set[str]:
    """Those of a document's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", without_code(document.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower().replace("`", "")).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tests_that_a_document_names_exist(document):
    written = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    for name in re.findall(r"(?<![\w/])test_\w+", document.read_text()):
        assert f"def {name}(" in written or (ROOT / f"tests/{name}.py").is_file(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_pictures_and_anchors_exist(document):
    for target in re.findall(r"\]\(([^)]+)\)", without_code(document.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = document.parent / path if path else document
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_document_is_in_the_list():
    listed = set(re.findall(r"\]\((\w+\.md)", text_of("docs/README.md")))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def top1(rows: list[dict[str, str]], model: str, post: str, granularity: str = "") -> list[float]:
    """Top-1 at each of BITS of the one `model` (the end of its path) in eval.py's rows."""
    found = {
        row["w_bit"]: float(row["top1"])
        for row in rows
        if row["model"].endswith(model) and row["post"] == post and row["granularity"].startswith(granularity)
    }
    return [found[bits] for bits in BITS]


def one_network(target: str, kind: str) -> list[list[float]]:
    """Top-1 of the network, or the three seeds, that a row links, at each of BITS."""
    post = "bn_reestimate" if EACH in kind else "none"
    path = (ROOT / "docs" / target).resolve()
    if path.suffix == ".pth":
        assert path.stem.endswith("_bn") == (ONCE in kind)
        channel = "channel" if "channel" in path.stem else "tensor"
        return [top1(results_below(ROOT / "results/weights"), f"models/{path.name}", post, channel)]
    rows = results_below(path)
    if path.name in ("sgd_channel_grids", "adam_update"):
        return [top1(rows, "ResNet150.pth" if "sgd" in path.name else "epoch_150.pth", post)]
    if path.name == "w2_channel_clipped_8_seeds":
        return [top1(rows, model, post) for model in sorted({row["model"] for row in rows})]
    family, renewed = path.name.removesuffix("_seeds"), ONCE in kind
    ours = f"W{family.removeprefix('w')}_ResNet{'_bn' if renewed else ''}.pth"
    later = [top1(rows, f"seed{seed}/{'bn' if renewed else 'epoch_150'}.pth", post) for seed in (2, 3)]
    return [*one_network(f"../models/{ours}", kind), *later]


def figures(networks: list[list[float]]) -> list[str]:
    if len(networks) == 1:
        return [f"{value:.2f}" for value in networks[0]]
    return [f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" for values in zip(*networks)]


def test_top1_over_bit_widths():
    """Every row of the tables over bit-widths in docs/results.md, except the authors' and one of a run cut off."""
    found: set[str] = set()
    for head, *rows in tables(text_of("docs/results.md")):
        if head[1:] != ["FP", "W8", "W6", "W5", "W4", "W3", "W2"]:
            continue
        for name, *cells in rows:
            link = re.search(r"\[([^]]*)\]\(([^)]*)\)", name)
            if not link:
                assert "the authors'" in name or "cut off" in name, name
                continue
            kind = EACH if EACH in name else head[0]
            if "vgg16_bn" in link[2]:
                epoch = re.search(r"(\d+) epochs", name)[1]
                post = "bn_reestimate" if kind == EACH else "none"
                expected = [top1(results_below(ROOT / "results/vgg16_bn/sgd"), f"epoch_{epoch}.pth", post)]
            elif link[1] == "seed 2":
                post = "bn_reestimate" if kind.endswith(EACH) else "none"
                expected = [top1(results_below(ROOT / "docs" / link[2]), "seed2/epoch_150.pth", post)]
            else:
                expected = one_network(link[2], kind)
            assert cells == figures(expected), name
            found.add(Path(link[2]).name)
    shipped = {path.name for path in (ROOT / "models").glob("*.pth")}
    assert {name for name in shipped if not name.startswith("S90")} <= found


def test_pruning_by_layer():
    text = text_of("docs/pruning.md")
    for folder, words in (
        ("s90_layer", r"global one and (\S+) by layer, or \S+ and (\S+) with batch norm"),
        ("s90_layer_inner", r"whole, by layer has (\S+) and (\S+) \("),
    ):
        rows = read_csv(ROOT / "results/sparse" / folder / "results.csv")
        found = {
            row["post"]: float(row["top1"]) for row in rows if row["sparsity"] == "0.9" and row["prune"] == "layer"
        }
        assert [*map(float, re.search(words, text).groups())] == [found["none"], found["bn_reestimate"]]


def test_the_worst_width_of_a_file():
    """Every row of the table of the file for an unknown bit-width: the least top-1 at six widths, as trained."""
    (table,) = [table for table in tables(text_of("docs/results.md")) if "at worst, 8 to 3 bits" in table[0]]
    rows = [row for row in results_below(ROOT / "results/weights") if row["post"] == "none"]
    for name, *cells in table[1:]:
        link = re.search(r"\]\(\.\./(models/[^)]*)\)", name)[1]
        granularity = "channel" if "per channel" in name else "tensor"
        found = {
            int(row["w_bit"]): float(row["top1"])
            for row in rows
            if row["model"] == link and row["granularity"] == granularity
        }
        least = [min((found[bits], bits) for bits in (8, 6, 5, 4, 3, 2) if bits >= last) for last in (3, 2)]
        assert cells == [f"{found[32]:.2f}", *(f"{top1:.2f} (W{bits})" for top1, bits in least)], name
    assert len(table) >= 6


def test_top1_over_shares_of_zeros():
    """Every row of docs/pruning.md's table, except the paper's."""
    (head, *rows), *_ = tables(text_of("docs/pruning.md"))
    zeros = [float(cell.removesuffix(" %")) / 100 if cell != "FP" else 0.0 for cell in head[2:]]
    results = [
        row for row in results_below(ROOT / "results/sparse") if row["w_bit"] == "32" and row["prune"] != "layer"
    ]
    file, found = "", set()
    for name, batch_norm, *cells in rows:
        if "paper" in name:
            continue
        file = (re.findall(r"\]\(\.\./models/(.*)\)", name) or [file])[0]
        post = "bn_reestimate" if batch_norm == "each" else "none"
        assert (batch_norm == "once") == file.endswith("_bn.pth")
        values = {
            float(row["sparsity"]): float(row["top1"])
            for row in results
            if row["model"] == f"models/{file}" and row["post"] == post
        }
        assert cells == [f"{values[share]:.2f}" for share in zeros], (name, batch_norm)
        found.add(file)
    assert {path.name for path in (ROOT / "models").glob("S90*.pth")} <= found


@pytest.mark.parametrize(
    "heading", ["activations", "post-training methods", "several bit-widths, pruned", "mean of", "CIFAR-10"]
)
def test_other_figures_of_results_are_in_the_files_that_they_name(heading):
    """Each figure of a section's tables is a top-1 in the folders that the section links."""
    sections = text_of("docs/results.md").split("\n## ")
    (section,) = (section for section in sections if heading in section.splitlines()[0])
    folders = {ROOT / "docs" / target for target in re.findall(r"\]\((\.\./results/[\w/]+)\)", section)}
    folders |= {ROOT / "results/weights/w4"}
    known = {f"{float(row['top1']):.2f}" for folder in folders for row in results_below(folder)}
    cells = {cell for table in tables(section) for row in table for cell in row if re.fullmatch(r"\d+\.\d\d", cell)}
    assert len(cells) >= 6 and cells <= known, cells - known


def re_estimated(row: dict[str, str]) -> float:
    """Top-1 with batch norm re-estimated, of the evaluation in results/studies/bn whose rows as trained are `row`'s."""
    networks: dict[str, dict[tuple[str, str], float]] = {}
    for other in results_below(ROOT / "results/studies/bn"):
        networks.setdefault(other["model"], {})[other["w_bit"], other["post"]] = float(other["top1"])
    bits, as_trained = row["bits"], (float(row["FP"]), float(row["at the target"]))
    (found,) = (
        top1[bits, "bn_reestimate"]
        for top1 in networks.values()
        if (top1["32", "none"], top1.get((bits, "none"))) == as_trained
    )
    return found


def test_figures_of_stages_are_those_of_their_runs():
    """Each row of a table in docs/ that begins with a run, against the last epoch of the run's metrics.csv."""
    found = 0
    for document in (ROOT / "docs").glob("*.md"):
        for head, *rows in tables(document.read_text()):
            for cells in rows:
                run = re.fullmatch(r"\[(\w+)\]\(\.\./results/runs/\1\)", cells[0])
                if not run or "at the target" not in head:
                    continue
                row, folder = dict(zip(head, cells)), ROOT / "results/runs" / run[1]
                last = read_csv(folder / "metrics.csv")[-1]
                assert row["FP"] == f"{float(last['fp_top1']):.2f}", cells
                assert row["at the target"] == f"{float(last['w' + row['bits'] + '_top1']):.2f}", cells
                for name, key in (("near the grid", "grid_share"), ("law", "expected_share")):
                    assert name not in row or row[name] == f"{100 * float(last[key]):.1f}", cells
                if "batch norm re-estimated" in row:
                    assert row["batch norm re-estimated"] == f"{re_estimated(row):.2f}", cells
                settings = json.loads((folder / "args.json").read_text())["args"]
                granularity = "tensor" if "tensor" in run[1] else "channel"
                assert settings["w_bit"] == int(row["bits"]) and settings["granularity"] == granularity
                found += 1
    assert found >= 10


def test_the_pretrained_network():
    """docs/results.md has the table that examples/pretrained.py printed."""
    lines = text_of("results/studies/pretrained/log.txt").splitlines()
    assert "\n".join(lines[lines.index("| | float | W8 | W4 | W4 per channel |") :]) in text_of("docs/results.md")


GPT = "results/studies/character_gpt"
WIDTHS = ["float", "w8", "w4", "w3", "w2"]


def nats(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def column(rows: list[dict[str, str]], key: str) -> list[float]:
    return [float(row[key]) for row in rows]


def shares_and_losses(rows: list[dict[str, str]]) -> list[str]:
    """Share near the grid in percent, tau, and nats per character at each width: the end of a row of a table."""
    tau = f"{statistics.mean(column(rows, 'tau')):.1f}" if rows[0]["tau"] else ""
    return [f"{100 * statistics.mean(column(rows, 'share')):.1f}", tau, *[nats(column(rows, key)) for key in WIDTHS]]


def test_the_character_gpt():
    """Its tables in docs/results.md: means over seeds of each arm and target, and the goals."""
    kinds: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in sorted(read_csv(ROOT / GPT / "results.csv"), key=lambda row: row["seed"]):
        kinds.setdefault((row["arm"], row["bits"]), []).append(row)
    section = next(
        part for part in text_of("docs/results.md").split("\n## ") if "character GPT" in part.splitlines()[0]
    )
    arms, goals = tables(section)
    assert {tuple(cells) for cells in arms[1:]} == {
        (f"`{arm}`", "" if arm == "adamw" else f"W{bits}", str(len(rows)), *shares_and_losses(rows))
        for (arm, bits), rows in kinds.items()
    }
    for name, limit, *cells in goals[1:]:
        bits, own = re.search(r"W(\d)", name)[1], "own float" in name
        high = column(kinds["update", bits], f"w{bits}" if own else "float")
        low = column(kinds["update", bits] if own else kinds["adamw", "4"], "float")
        above = [a - b for a, b in zip(high, low, strict=True)]
        assert cells == [nats(above), "met" if statistics.mean(above) <= float(limit) else "missed"], name


def test_held_out_runs_of_the_character_gpt():
    rows = read_csv(ROOT / GPT / "heldout.csv")
    table = next(table for table in tables(text_of("docs/experiments.md")) if table[0][0] == "arm")
    assert table[1:] == [
        [
            f"`{row['arm']}`",
            "" if row["arm"] == "adamw" else f"W{row['bits']}",
            row["lambda_s"],
            row["psg"],
            row["drop"],
            *shares_and_losses([row]),
        ]
        for row in rows
    ]


def test_noise_of_quantized_activations():
    """docs/deployment.md has the table that tools.activation_table makes of its file."""
    from tools.activation_table import NETWORKS, markdown

    rows = read_csv(ROOT / "results/benchmarks/activations.csv")
    assert list(dict.fromkeys(row["network"] for row in rows)) == NETWORKS
    assert markdown(rows) in text_of("docs/deployment.md")


def test_the_table_of_onnx_networks():
    from tools.onnx_table import NETWORKS, markdown

    rows = read_csv(ROOT / "results/benchmarks/onnx_networks.csv")
    assert markdown(rows) in text_of("docs/deployment.md"), "run python -m tools.onnx_table"
    assert list(dict.fromkeys(row["network"] for row in rows)) == list(NETWORKS)
    assert all(float(row["difference"]) < (0.1 if "A" in row["kind"] else 1e-4) for row in rows)


def test_sizes_of_sparse_files(tmp_path):
    """docs/pruning.md has the bytes of packed files, and those that zlib makes of them, which vary with its version."""
    table = next(table for table in tables(text_of("docs/pruning.md")) if table[0][1] == "bytes, 4 bits")
    for link, size, compressed in table[1:]:
        path = ROOT / "docs" / re.search(r"\((.*)\)", link)[1]
        export(model_from_checkpoint(load_checkpoint(path), str(path)).eval(), tmp_path / "w4.safetensors", 4)
        content = (tmp_path / "w4.safetensors").read_bytes()
        assert len(content) == int(size.replace(",", ""))
        assert len(zlib.compress(content, 9)) == pytest.approx(int(compressed.replace(",", "")), rel=0.05)


def test_the_table_of_optimizers():
    """docs/performance.md has the tables that tools.benchmark_optimizer makes of its file."""
    from tools.benchmark_optimizer import NETWORKS, markdown, markdown_of_functions

    rows = read_csv(ROOT / "results/benchmarks/optimizer.csv")
    assert list(dict.fromkeys(row["network"] for row in rows)) == list(NETWORKS)
    assert markdown(rows) in text_of("docs/performance.md")
    assert markdown_of_functions(rows) in text_of("docs/performance.md")


def test_the_table_of_several_processes():
    """docs/performance.md has the table that tools.benchmark_distributed makes of its file."""
    from tools.benchmark_distributed import WRAPS, markdown

    rows = read_csv(ROOT / "results/benchmarks/distributed.csv")
    assert {row["wrap"] for row in rows} == set(WRAPS)
    assert markdown(rows) in text_of("docs/performance.md")


def test_figures_of_the_readme_are_those_of_the_documents():
    """Each row of its tables with figures, and its first line of figures, is a row of a table in docs/."""
    known = [
        " | ".join(row) for document in (ROOT / "docs").glob("*.md") for table in tables(document.read_text())
        for row in table
    ]  # fmt: skip
    pattern = r"\d\d\.\d\d(?: ± \d\.\d\d)?"
    readme, found = text_of("README.md"), 0
    for table in tables(readme):
        for row in table[1:]:
            if wanted := re.findall(pattern, " ".join(row)):
                assert any(all(figure in line for figure in wanted) for line in known), row
                found += 1
    assert found >= 15
    line = next(line for line in readme.splitlines() if line.startswith("ResNet-32, CIFAR-100"))
    assert all(any(figure in known_line for known_line in known) for figure in re.findall(pattern, line))


def test_stages_of_the_provenance_are_those_that_ran():
    """The flags of each row of docs/provenance.md, against the args.json of its first run."""
    import train

    table = next(table for table in tables(text_of("docs/provenance.md")) if table[0][:3] == ["row", "flags", "run"])
    common = ["--load_pretrained", "models/ResNet82.pth", "--epoch", "150", "--decay_epoch", "123", "--seed", "1"]
    rows = table[1:]
    for name, flags, runs, *_ in rows:
        named = re.findall(r"\w+_(?:seed\d|stopped)\b", runs)
        assert named and all((ROOT / "results/runs" / run).is_dir() for run in named), name
        if "`--" not in flags or flags.startswith("the same") or "three stages" in flags:
            continue
        words = re.search(r"`([^`]*)`", flags)[1].split()
        said = vars(train.parser().parse_args([*common, *words]))
        ran = json.loads((ROOT / "results/runs" / named[0] / "args.json").read_text())["args"]
        for key in ("psg", "target", "adam", "arch", "epoch", "decay_epoch", "lr", "l1"):
            assert said[key] == ran.get(key, said[key]), (name, key)
        for key in ("w_bit", "lambda_s", "granularity") if said["psg"] and said["target"] == "grid" else ():
            assert said[key] == ran.get(key, said[key]), (name, key)
    assert len(rows) >= 20
