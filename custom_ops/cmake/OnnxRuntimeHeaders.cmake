# Sets ONNXRUNTIME_INCLUDE_DIR to a folder with onnxruntime_cxx_api.h, the first of:
#   1. -DONNXRUNTIME_INCLUDE_DIR=...
#   2. ONNXRUNTIME_ROOT (CMake or environment variable): an unpacked onnxruntime release
#   3. find_package(onnxruntime)
#   4. an npm package that carries the official headers, pinned by version and checksum, in FPTQ_HEADER_CACHE
# Only headers are needed: the library does not link to onnxruntime.

set(FPTQ_HEADER_CACHE "${CMAKE_CURRENT_SOURCE_DIR}/../build/onnxruntime-headers"
    CACHE PATH "Where headers fetched through npm are kept")

set(_npm_name "com.github.asus4.onnxruntime")
set(_npm_version "0.4.9")
set(_npm_sha256 "e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d")
set(_npm_headers "package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers")

function(_fptq_fetch_headers destination)
  find_program(FPTQ_NPM npm)
  if(NOT FPTQ_NPM)
    message(FATAL_ERROR
      "The headers of onnxruntime were not found, and npm, which would fetch them, is not installed.\n"
      "Either install npm, or download an onnxruntime release and set ONNXRUNTIME_ROOT to its folder, "
      "or pass -DONNXRUNTIME_INCLUDE_DIR=<folder with onnxruntime_cxx_api.h>.")
  endif()
  message(STATUS "Fetching the onnxruntime headers: npm package ${_npm_name}@${_npm_version} (150 MB)")
  set(work "${destination}.tmp")
  file(REMOVE_RECURSE "${work}")
  file(MAKE_DIRECTORY "${work}")
  execute_process(COMMAND "${FPTQ_NPM}" pack --silent "${_npm_name}@${_npm_version}"
                  WORKING_DIRECTORY "${work}" RESULT_VARIABLE status OUTPUT_QUIET ERROR_VARIABLE error)
  set(archive "${work}/${_npm_name}-${_npm_version}.tgz")
  if(NOT status EQUAL 0 OR NOT EXISTS "${archive}")
    message(FATAL_ERROR
      "npm could not fetch ${_npm_name}@${_npm_version}:\n${error}\n"
      "Check the network or npm's registry setting, or set ONNXRUNTIME_ROOT to an unpacked onnxruntime release.")
  endif()
  file(SHA256 "${archive}" actual)
  if(NOT actual STREQUAL _npm_sha256)
    message(FATAL_ERROR "${archive} has SHA-256 ${actual}, expected ${_npm_sha256}. Nothing was extracted.")
  endif()
  file(ARCHIVE_EXTRACT INPUT "${archive}" DESTINATION "${work}" PATTERNS "${_npm_headers}/*")
  file(REMOVE_RECURSE "${destination}")
  file(RENAME "${work}/${_npm_headers}" "${destination}")
  file(REMOVE_RECURSE "${work}")
endfunction()

if(NOT ONNXRUNTIME_INCLUDE_DIR)
  unset(_found CACHE)
  find_path(_found onnxruntime_cxx_api.h NO_DEFAULT_PATH
    HINTS "${ONNXRUNTIME_ROOT}" "$ENV{ONNXRUNTIME_ROOT}"
    PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session)
  if(NOT _found AND (ONNXRUNTIME_ROOT OR DEFINED ENV{ONNXRUNTIME_ROOT}))
    message(FATAL_ERROR "ONNXRUNTIME_ROOT (${ONNXRUNTIME_ROOT}$ENV{ONNXRUNTIME_ROOT}) holds no onnxruntime_cxx_api.h. "
                        "Set it to an unpacked onnxruntime release, or unset it.")
  endif()
  if(NOT _found)
    find_package(onnxruntime CONFIG QUIET)
    if(TARGET onnxruntime::onnxruntime)
      get_target_property(_dirs onnxruntime::onnxruntime INTERFACE_INCLUDE_DIRECTORIES)
      find_path(_found onnxruntime_cxx_api.h NO_DEFAULT_PATH HINTS ${_dirs} PATH_SUFFIXES onnxruntime)
    endif()
  endif()
  if(NOT _found)
    set(_cached "${FPTQ_HEADER_CACHE}/${_npm_version}")
    if(NOT EXISTS "${_cached}/onnxruntime_cxx_api.h")
      _fptq_fetch_headers("${_cached}")
    endif()
    set(_found "${_cached}")
  endif()
  set(ONNXRUNTIME_INCLUDE_DIR "${_found}" CACHE PATH "Folder with onnxruntime_cxx_api.h" FORCE)
  unset(_found CACHE)
endif()
if(NOT EXISTS "${ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_cxx_api.h")
  message(FATAL_ERROR "ONNXRUNTIME_INCLUDE_DIR=${ONNXRUNTIME_INCLUDE_DIR} holds no onnxruntime_cxx_api.h.")
endif()
message(STATUS "onnxruntime headers: ${ONNXRUNTIME_INCLUDE_DIR}")
