# A digest of the operators' sources, so that a library built elsewhere (PYARD_PREBUILT) can be told from one of other sources.
# pyard/ops/prebuilt.py computes the same one.
file(GLOB_RECURSE sources RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}" CONFIGURE_DEPENDS
  "csrc/*.cpp" "csrc/*.h" "csrc/*.cu" "csrc/*.cuh")
list(FILTER sources EXCLUDE REGEX "^csrc/trajectory/")
list(SORT sources)
set(listing "")
foreach(source IN LISTS sources)
  file(SHA256 "${CMAKE_CURRENT_SOURCE_DIR}/${source}" digest)
  string(APPEND listing "${digest} ${source}\n")
endforeach()
string(SHA256 digest "${listing}")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${sources})
set_property(SOURCE csrc/sources.cpp APPEND PROPERTY COMPILE_DEFINITIONS "PYARD_SOURCES=\"${digest}\"")
