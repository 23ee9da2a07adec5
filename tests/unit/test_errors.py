"""Every error has a name of its own and a place in the table of statuses."""

from __future__ import annotations

from app import errors
from app.api.edge import HTTP_STATUS, error_response


def every_class(root: type[errors.RuntimeFault]) -> list[type[errors.RuntimeFault]]:
    return [root, *(found for child in root.__subclasses__() for found in every_class(child))]


def test_every_error_has_a_status_and_no_status_is_left_over() -> None:
    codes = [each.code for each in every_class(errors.RuntimeFault)]
    assert len(set(codes)) == len(codes)
    assert set(codes) == set(HTTP_STATUS)


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert errors.__doc__
    for each in every_class(errors.RuntimeFault):
        assert each.__name__ in errors.__doc__


def test_an_overloaded_server_says_when_to_come_back() -> None:
    response = error_response(errors.Overloaded("full", retry_after=2.1))
    assert response.status_code == 429 and response.headers["Retry-After"] == "3"
    assert response.body == b'{"error": "full"}'
