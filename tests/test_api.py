"""docs/api.md is what the package's docstrings say."""

import quant
import quant.deploy
from tests.helpers import ROOT
from tools.api import first_sentence, page

PAGE = (ROOT / "docs/api.md").read_text()


def test_the_page_is_current(cli, tmp_path):
    assert page() == PAGE, "run python -m tools.api"
    assert cli("tools.api", "--out", "api.md").code == 0
    assert (tmp_path / "api.md").read_text() == PAGE


def test_every_public_name_has_a_whole_row():
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    names = [row[0].strip("`").partition("(")[0] for row in rows]
    assert names == [*quant.__all__, *quant.deploy.__all__]
    assert all(len(row) == 2 and len(row[1]) > 20 for row in rows)


def test_a_sentence_ends_at_its_full_stop_and_not_at_three_dots():
    def function():
        """Packs integers -4 ... 3 of |w|
        into bytes. Raises ValueError.

        More.
        """

    assert first_sentence(function) == r"Packs integers -4 ... 3 of \|w\| into bytes."


def test_an_output_that_cannot_be_written_is_one_line(rejected):
    assert "--out no/a.md cannot be written" in rejected("tools.api", "--out", "no/a.md")
