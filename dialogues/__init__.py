"""Pictures and questions about them: made ones, and those of others."""
