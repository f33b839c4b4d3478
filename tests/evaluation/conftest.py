"""Local servers, closed after each test."""

import pytest

from tests.evaluation.judges.server import Server


@pytest.fixture
def serve():
    servers = []

    def start(script, models=None):
        servers.append(Server(script, models))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
