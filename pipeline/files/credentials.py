"""Credentials are refused in every value, since values are stored, printed and sent to W&B."""

from collections.abc import Iterable

from retemper.pipeline.errors import UserError, masked


def refuse_credentials(texts: Iterable[str]) -> None:
    """Refuse words of a command line, or values as key=value, that contain a credential.

    Raises:
        UserError: one does; in the message it is masked.
    """
    for text in texts:
        if masked(text) != text:
            raise UserError(
                f"{text} contains a password, key or token, which would be stored where others can "
                "read it: leave it out, and let the store's client take it from the environment: "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://, "
                "GOOGLE_APPLICATION_CREDENTIALS for gs://, HF_TOKEN for hf://. "
                "What stood on a command line or in a file is known to others: replace it"
            )
