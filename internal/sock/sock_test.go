package sock

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// pair returns both ends of a connection over the loopback.
func pair(t *testing.T) (near, far *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	nc, err := net.Dial("tcp4", ln.Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() { nc.Close() })
	other, err := ln.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { other.Close() })
	return nc.(*net.TCPConn), other.(*net.TCPConn)
}

// rawOf returns the RawConn through which the tests call package sock.
func rawOf(t *testing.T, c syscall.Conn) syscall.RawConn {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	return raw
}

// arrived waits until Peek reports something on raw, and returns it.
func arrived(t *testing.T, raw syscall.RawConn) (seen Seen) {
	t.Helper()
	require.Eventually(t, func() bool {
		raw.Control(func(fd uintptr) { seen = Peek(fd) })
		return seen != Seen{}
	}, time.Minute, time.Millisecond)
	return seen
}

func TestALookTakesNothingOutAndDoesNotWait(t *testing.T) {
	if !CanPeek {
		t.Skip("nobody can look into a socket here")
	}
	near, far := pair(t)
	raw := rawOf(t, near)
	b := make([]byte, 8)
	raw.Control(func(fd uintptr) {
		require.Equal(t, Seen{}, Peek(fd), "the peer is there and has sent nothing")
		_, err := ReadNow(fd, b)
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	})
	_, err := far.Write([]byte("hello"))
	require.NoError(t, err)
	for range 2 {
		require.Equal(t, Seen{Bytes: true}, arrived(t, raw))
	}
	raw.Control(func(fd uintptr) {
		n, err := ReadNow(fd, b)
		require.NoError(t, err)
		require.Equal(t, "hello", string(b[:n]))
		require.Equal(t, Seen{}, Peek(fd))
	})
	require.NoError(t, far.CloseWrite())
	require.Equal(t, Seen{Err: io.EOF}, arrived(t, raw))
	raw.Control(func(fd uintptr) {
		_, err := ReadNow(fd, b)
		require.Equal(t, io.EOF, err)
	})
}

func TestAResetIsSeen(t *testing.T) {
	if !CanPeek {
		t.Skip("nobody can look into a socket here")
	}
	near, far := pair(t)
	require.NoError(t, far.SetLinger(0))
	require.NoError(t, far.Close())
	seen := arrived(t, rawOf(t, near))
	require.ErrorIs(t, seen.Err, ErrReset)
	require.False(t, seen.Bytes)
}

func TestASocketIsItselfAndNoOther(t *testing.T) {
	a, _ := pair(t)
	b, _ := pair(t)
	rawOf(t, a).Control(func(fd uintptr) {
		who, known := Identify(fd)
		if !known {
			t.Skip("this system does not tell")
		}
		require.True(t, Still(fd, who))
		rawOf(t, b).Control(func(fd uintptr) {
			other, known := Identify(fd)
			require.True(t, known)
			require.NotEqual(t, who, other)
			require.False(t, Still(fd, who))
			require.True(t, Still(fd, other))
		})
	})
	_, known := Identify(1 << 20)
	require.False(t, known, "no descriptor has this number")
}

func TestACloseThatWaitsIsKnown(t *testing.T) {
	if !CanPeek {
		t.Skip("a socket is asked nothing here")
	}
	near, _ := pair(t)
	lingers := func() (yes bool) {
		rawOf(t, near).Control(func(fd uintptr) { yes = Lingers(fd) })
		return yes
	}
	require.False(t, lingers())
	require.NoError(t, near.SetLinger(3))
	require.True(t, lingers())
	require.NoError(t, near.SetLinger(0))
	require.False(t, lingers(), "it resets, and does not wait")
}

func TestErrorsOfFilesAreKnownWhereverTheyHide(t *testing.T) {
	for _, err := range []error{ErrProcessFiles, ErrSystemFiles} {
		require.True(t, OutOfFiles(err))
		require.True(t, OutOfFiles(&net.OpError{Op: "dial", Err: os.NewSyscallError("socket", err)}))
	}
	require.False(t, OutOfFiles(nil))
	require.False(t, OutOfFiles(ErrRefused))
	require.True(t, FullBacklog(&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EAGAIN)}))
	require.False(t, FullBacklog(nil))
	require.False(t, FullBacklog(ErrRefused))
	require.False(t, NoFileFree())
	if limit, ok := FileLimit(); ok {
		require.Positive(t, limit)
	}
}

// An option that a socket cannot have is refused before any system call is made.
func TestASocketOfAnotherFamilyIsRefusedItsOptions(t *testing.T) {
	if (Options{DSCP: 1}).Supported() != nil || (Options{UserTimeout: time.Second}).Supported() != nil {
		t.Skip("this system has none of them")
	}
	near, _ := pair(t)
	err := Options{DSCP: 46}.BeforeConnect("unix", rawOf(t, near))
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, `QoS.DSCP: network "unix" is neither IPv4 nor IPv6`)
	err = Options{UserTimeout: time.Second}.BeforeConnect("unix", rawOf(t, near))
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, `QoS.UserTimeout: network "unix" is not TCP`)
}

// told is one event that a Watcher reported.
type told struct {
	fd     uintptr
	hungUp bool
}

func watching(t *testing.T) (*Watcher, <-chan told, <-chan struct{}) {
	t.Helper()
	if !CanWatch {
		t.Skip("there is no watcher here")
	}
	w, err := NewWatcher()
	require.NoError(t, err)
	heard, ended := make(chan told, 64), make(chan struct{})
	go func() {
		defer close(ended)
		w.Run(func(fd uintptr, hungUp bool) { heard <- told{fd, hungUp} })
	}()
	t.Cleanup(func() { w.Close(); <-ended })
	return w, heard, ended
}

func numberOf(raw syscall.RawConn) (n uintptr) {
	raw.Control(func(fd uintptr) { n = fd })
	return n
}

func TestAWatcherHearsAHangUpAndNoData(t *testing.T) {
	w, heard, _ := watching(t)
	near, far := pair(t)
	raw := rawOf(t, near)
	require.NoError(t, w.Add(raw, false))
	require.NoError(t, w.Add(raw, false), "a second time changes nothing")
	_, err := far.Write([]byte("data"))
	require.NoError(t, err)
	require.Equal(t, Seen{Bytes: true}, arrived(t, raw))
	require.NoError(t, far.CloseWrite())
	require.Equal(t, told{numberOf(raw), true}, <-heard)
	require.NoError(t, w.Rearm(raw, false))
	require.Equal(t, told{numberOf(raw), true}, <-heard, "of what there is already")
}

func TestAWatcherHearsOfDataOnce(t *testing.T) {
	w, heard, _ := watching(t)
	near, far := pair(t)
	raw := rawOf(t, near)
	require.NoError(t, w.Add(raw, true))
	_, err := far.Write([]byte("data"))
	require.NoError(t, err)
	require.Equal(t, told{numberOf(raw), false}, <-heard)
	_, err = far.Write([]byte("more"))
	require.NoError(t, err)
	require.NoError(t, far.CloseWrite()) // the Watcher does not report this either until the connection is rearmed
	b, err := io.ReadAll(near)
	require.NoError(t, err)
	require.Equal(t, "datamore", string(b))
	select {
	case h := <-heard:
		t.Fatalf("%+v, although nobody armed it", h)
	default:
	}
	require.NoError(t, w.Rearm(raw, true))
	require.Equal(t, told{numberOf(raw), true}, <-heard)
}

func TestAWatcherForgetsWhatIsRemovedAndEndsWithItsClose(t *testing.T) {
	w, heard, ended := watching(t)
	near, far := pair(t)
	raw := rawOf(t, near)
	require.NoError(t, w.Add(raw, false))
	w.Remove(raw)
	require.Error(t, w.Rearm(raw, false), "it is not watched")
	require.NoError(t, far.Close())
	require.Equal(t, Seen{Err: io.EOF}, arrived(t, raw))
	other, otherFar := pair(t)
	require.NoError(t, w.Add(rawOf(t, other), false))
	require.NoError(t, otherFar.Close())
	require.Equal(t, told{numberOf(rawOf(t, other)), true}, <-heard, "and nothing of the first")
	w.Close()
	<-ended
	w.Close()
	require.NoError(t, w.Add(raw, false), "after Close nothing is done")

	var none *Watcher
	require.NoError(t, none.Add(raw, false))
	require.NoError(t, none.Rearm(raw, true))
	none.Remove(raw)
	none.Close()
	require.NoError(t, w.Add(nil, false), "there is no descriptor")
}
