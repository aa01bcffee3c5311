"""Files of tensors (safetensors): read as strangers wrote them, written whole or not at all."""
