"""Tables that are small on the disk and huge in memory are refused before they are unpacked."""

import pyarrow
import pytest
from pyarrow import parquet

from uipe_core.corpora import rows
from uipe_core.corpora.rows import read_rows
from uipe_core.errors import UserError


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_table_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch, dictionary):
    path = tmp_path / "test.parquet"
    table = pyarrow.table({"question": ["what? " * 10_000] * 2000})
    parquet.write_table(table, path, compression="zstd", use_dictionary=dictionary)
    assert path.stat().st_size < 1_000_000 < 100_000_000 < table.nbytes
    assert sum(1 for _ in read_rows(path)) == 2000
    monkeypatch.setattr(rows, "MOST_BYTES", 60_000_000)
    with pytest.raises(UserError, match=r"test\.parquet: unpacks to more than .*give a table of fewer"):
        list(read_rows(path))
