"""What people read is shown as it is."""

import pytest

from elastic.console import say, wide

ODD = "runs/a[/b] [bold]c[/] :smile:"


@pytest.mark.parametrize("how", ["line", "table", "said"])
def test_names_that_read_like_markup_are_names(capsys, how):
    from rich.table import Table

    if how == "said":
        say(ODD)
        assert ODD in capsys.readouterr().err
        return
    table = Table(ODD, title=ODD)
    table.add_row(ODD)
    wide().print(table if how == "table" else ODD, style="red")
    assert capsys.readouterr().out.count(ODD) == (3 if how == "table" else 1)
