"""The parts of `VLLMServerEngine`: one server's endpoints, what it answers, which replica is asked, and who is in rotation."""
