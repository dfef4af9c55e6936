"""What one client may take of a server, so that no request can take all of it."""

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from phikit.base.config import Config
from phikit.serve.worker import MAX_QUEUE


class Limits(Config):
    """Bounds of a server. Beyond one of them a request is refused, with the bound in the error."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    max_body_bytes: PositiveInt = 32 << 20
    """Of a request; images and audio count as base64."""
    max_header_bytes: int = Field(default=32 << 10, ge=1 << 10)
    """Of request line and headers together."""
    max_connections: PositiveInt = 1024
    """Open at once; more are answered with 503."""
    max_queue: PositiveInt = MAX_QUEUE
    """Requests that wait for their first token, at one model."""
    max_samples: PositiveInt = 16
    """Replies of one request: `n` times the prompts."""
    max_media: PositiveInt = 8
    """Images and clips of one request."""
    max_media_requests: PositiveInt = 4
    """Requests with images or clips at once; an image may take 90 MB until its prompt is read."""
    max_embeddings: PositiveInt = 256
    """Inputs of one request for embeddings."""
    max_embedding_tokens: PositiveInt = 2048
    """Of one input: it is read in one piece, for which all others wait."""
    new_tokens: PositiveInt = 2048
    """Longest reply, where the client names no length and the context has room for it."""
    header_timeout_s: PositiveFloat = 10.0
    """For the headers of a request to come."""
    body_timeout_s: PositiveFloat = 60.0
    """For its body."""
    request_timeout_s: PositiveFloat = 600.0
    """For the reply, waiting included."""
    write_timeout_s: PositiveFloat = 60.0
    """For a reader to take what has been sent, before it is given up."""
    shutdown_s: int = Field(default=15, ge=0)
    """For running replies to finish when the server is told to stop."""
