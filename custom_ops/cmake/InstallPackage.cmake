# Installs the library, its headers and its CMake package (find_package(fptq_ops), target fptq_ops::fptq_ops) twice:
#   component sdk, for `cmake --install build --component sdk --prefix DIR`: lib/, include/, lib/cmake/fptq_ops/
#   component python, laid out for the Python package: the library at its top, include/, cmake/fptq_ops/
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(_config "${CMAKE_CURRENT_BINARY_DIR}/fptq_ops-config.cmake")
file(CONFIGURE OUTPUT "${_config}" @ONLY CONTENT [[
# fptq_ops @PROJECT_VERSION@: target fptq_ops::fptq_ops, header fptq/register.h. onnxruntime's headers and library are
# the program's own: any release from 1.23 works.
set(fptq_ops_CUDA @FPTQ_WITH_CUDA@)  # whether the library holds CUDA kernels
include("${CMAKE_CURRENT_LIST_DIR}/fptq_ops-targets.cmake")
]])
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/fptq_ops-config-version.cmake"
                                 COMPATIBILITY SameMinorVersion)

function(_fptq_install component library_dir include_dir package_dir)
  install(TARGETS fptq_ops EXPORT fptq_ops_${component}
          LIBRARY DESTINATION "${library_dir}" COMPONENT ${component}
          RUNTIME DESTINATION "${library_dir}" COMPONENT ${component}
          ARCHIVE DESTINATION "${library_dir}" COMPONENT ${component}
          INCLUDES DESTINATION "${include_dir}")
  install(FILES include/fptq/fptq_ops.h include/fptq/register.h
          DESTINATION "${include_dir}/fptq" COMPONENT ${component})
  install(EXPORT fptq_ops_${component} NAMESPACE fptq_ops:: FILE fptq_ops-targets.cmake
          DESTINATION "${package_dir}" COMPONENT ${component})
  install(FILES "${_config}" "${CMAKE_CURRENT_BINARY_DIR}/fptq_ops-config-version.cmake"
          DESTINATION "${package_dir}" COMPONENT ${component})
endfunction()

_fptq_install(sdk "${CMAKE_INSTALL_LIBDIR}" "${CMAKE_INSTALL_INCLUDEDIR}" "${CMAKE_INSTALL_LIBDIR}/cmake/fptq_ops")
_fptq_install(python . include cmake/fptq_ops)
install(FILES "${record}" DESTINATION . COMPONENT python)
