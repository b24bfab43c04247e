from ._exchange import HTTPConnection
class HTTP2Connection(HTTPConnection):
    pass
