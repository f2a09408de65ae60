"""Loaders, as a user hands them over: what they say of their length, and their own failures by name."""

from collections.abc import Iterable, Iterator, Sized

from compressor.errors import DataError


def batch_count(batches: object) -> int | None:
    """How many batches there are, where that can be told; a `DataLoader` over an iterable data set cannot."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def is_missing(batches: object) -> bool:
    """Whether there are no batches at all: none were given, or the loader says that it has none."""
    return batches is None or batch_count(batches) == 0


def guarded(batches: Iterable[object], what: str) -> Iterator[object]:
    """The batches; a loader's own failure is named.

    Raises:
        DataError: It is no loader, raises, or ends before the number of batches that it says.
    """
    expected, k = batch_count(batches), 0
    try:
        iterator = iter(batches)
    except TypeError as error:
        raise DataError(f"{what}: batches must be iterable, found {type(batches).__name__}") from error
    except Exception as error:
        raise DataError(f"{what}: the loader cannot begin ({type(error).__name__}: {error})") from error
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            if expected is not None and k < expected:
                raise DataError(f"{what}: the loader ended after {k} of the {expected} batches that it says it has") from None
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{what}: batch {k}: the loader raised {type(error).__name__}: {error}") from error
        yield batch
        k += 1
