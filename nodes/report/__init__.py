"""What a node says of its last run, in all languages of the page: `of_sampling`, `of_decoding`, `of_warnings`."""

from .lines import of_decoding, of_no_step, of_sampling, of_warnings  # noqa: F401
