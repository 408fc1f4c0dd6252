// Which sources this library was built from: in a file of its own, since the digest changes with every one of them.
extern "C" __attribute__((visibility("default"))) const char* pyard_sources() { return PYARD_SOURCES; }
