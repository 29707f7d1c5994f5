"""Models by name: torchvision, timm, Hugging Face, modules and files."""
