"""tokexport: the compiler for token-compressed vision-language models."""
