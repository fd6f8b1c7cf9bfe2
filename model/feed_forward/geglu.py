"""GeGLU, Gemma's mlp."""

from torch import Tensor
from torch.nn.functional import gelu

from model.feed_forward.glu import GLU


class GeGLU(GLU):
    """down(gelu(gate(x)) * up(x)) with the tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        """x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
        return gelu(x, approximate="tanh")
