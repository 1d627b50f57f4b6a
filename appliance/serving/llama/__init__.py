"""llama.cpp through its C API: models, contexts that decode several sequences together, sampling, embeddings, ranking.

The only package of `appliance` that imports llama_cpp, and the only one that uses llama.cpp's names. `Model` may be used
from several threads (its vocabulary is constant); a context belongs to one. Knows nothing of queues, templates or HTTP.
"""

from appliance.serving.llama.context import Context
from appliance.serving.llama.model import Model
from appliance.serving.llama.pooling import PoolingContext

__all__ = ["Context", "Model", "PoolingContext"]
