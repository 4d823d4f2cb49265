//go:build !(linux || darwin || dragonfly || freebsd || netbsd || openbsd || windows)

package sock

import "errors"

// Some of these systems have some of the options. None is listed, because no test has
// ever run on one of these systems.
var socketsCan = capabilities{}

func setTrafficClass(uintptr, bool, int) error { return errors.ErrUnsupported }

func setUserTimeout(uintptr, int) error { return errors.ErrUnsupported }

func setSendBuffer(uintptr, int) error { return errors.ErrUnsupported }

func setRecvBuffer(uintptr, int) error { return errors.ErrUnsupported }
