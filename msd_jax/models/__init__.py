"""From config.json and safetensors to a decoder, and back."""
