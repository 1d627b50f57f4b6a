"""Signs a small file and checks its signature, offline, with the OpenSSF's `model-signing`; the only file importing it.

Keys are elliptic curve keys in PEM (P-256, P-384 or P-521); what is signed is a sigstore bundle, as the library writes it.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from appliance.errors import RecipeError, VerificationFailed

SIGNED_NAME = "content"
# The library reads what it is given without looking: what is malformed fails in whatever way it happens to fail.
_MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError)


def sign(content: bytes, private_key: Path) -> bytes:
    """Raises `RecipeError` when the file is no such key."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from model_signing import signing

    _require_readable(private_key)
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except (*_MALFORMED, UnsupportedAlgorithm) as error:
        raise RecipeError(
            f"{private_key} is no unencrypted elliptic curve key in PEM ({error}); "
            "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one."
        ) from error
    with _folder_with(content) as folder:
        signature = folder.with_name("signature")
        config.sign(folder, signature)
        return signature.read_bytes()


def check(content: bytes, signature: bytes, public_key: Path) -> None:
    """Raises `VerificationFailed` when `signature` is not one of `content` by that key, `RecipeError` when it is no key."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from model_signing import hashing, verifying

    _require_readable(public_key)
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (*_MALFORMED, UnsupportedAlgorithm) as error:
        raise RecipeError(
            f"{public_key} is no public elliptic curve key in PEM ({error}); "
            "`openssl ec -in key.pem -pubout -out key.pub` writes it."
        ) from error
    config.set_hashing_config(hashing.Config().use_file_serialization(hashing_algorithm="sha256"))
    with _folder_with(content) as folder:
        path = folder.with_name("signature")
        path.write_bytes(signature)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # where it prints its warnings; stdout is ours
                config.verify(folder, path)
        except (*_MALFORMED, InvalidSignature) as error:
            raise VerificationFailed(
                f"The signature is not one by {public_key} over this content ({str(error) or type(error).__name__})."
            ) from error


def _require_readable(key: Path) -> None:
    if not key.is_file():
        raise RecipeError(f"{key} does not exist; name a key file in PEM.")


@contextlib.contextmanager
def _folder_with(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "signed"
        folder.mkdir()
        (folder / SIGNED_NAME).write_bytes(content)
        yield folder
