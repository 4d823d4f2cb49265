//go:build linux

package realservers

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
)

// realServer is a server of the distribution, started by a test on loopback and
// on a Unix socket. It never runs as root, and never outlives the test, not
// even if the test binary is killed.
type realServer struct {
	kind  *realKind
	path  map[string]string // of each of kind.programs
	dir   string            // everything it writes; short, for a Unix socket's path has 107 bytes at most
	port  int
	idle  time.Duration // after which it closes an idle connection; 0: never
	owner *syscall.Credential
	procs []*realProcess
}

// realProcess is one process of it. left is closed when it is gone.
type realProcess struct {
	cmd  *exec.Cmd
	left chan struct{}
}

const (
	realStartTime = 30 * time.Second // for a server to come up; more than any needs
	realPoll      = 5 * time.Millisecond
)

func startReal(t *testing.T, kind *realKind, idle time.Duration) *realServer {
	t.Helper()
	s := &realServer{kind: kind, idle: idle, path: make(map[string]string)}
	for _, program := range kind.programs {
		path := lookUpProgram(program)
		if path == "" {
			t.Skipf("there is no %s on this machine: install the package of %s", program, kind.name)
		}
		s.path[program] = path
	}
	if os.Geteuid() == 0 { // postgres and memcached refuse root, and the others need it as little
		nobody, err := user.Lookup("nobody")
		if err != nil {
			t.Skipf("we are root, and there is no other user to run %s: %v", kind.name, err)
		}
		uid, _ := strconv.Atoi(nobody.Uid)
		gid, _ := strconv.Atoi(nobody.Gid)
		s.owner = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	var err error
	s.dir, err = os.MkdirTemp("", "rs")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(s.dir) })
	if s.owner != nil {
		require.NoError(t, os.Chown(s.dir, int(s.owner.Uid), int(s.owner.Gid)))
	}
	t.Cleanup(func() {
		s.stop(kind.stop)
		if t.Failed() {
			log, _ := os.ReadFile(s.file("log"))
			t.Logf("%s said:\n%s", kind.name, log[max(0, len(log)-4000):])
		}
	})
	if kind.prepare != nil {
		kind.prepare(t, s)
	}
	// A port that is free now may be taken when the server binds it.
	for range 5 {
		s.port = freePort(t)
		if err = s.start(); err == nil {
			return s
		}
		if errors.Is(err, syscall.EPERM) {
			t.Skipf("this root may not run %s as somebody else: %v", kind.name, err)
		}
	}
	require.NoError(t, err, "no start in five tries, each on another port")
	return nil
}

// lookUpProgram looks in PATH and where Debian puts servers; the newest
// version wins.
func lookUpProgram(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, pattern := range []string{"/usr/sbin", "/usr/local/sbin", "/sbin", "/usr/lib/postgresql/*/bin"} {
		found, _ := filepath.Glob(filepath.Join(pattern, name))
		if len(found) > 0 {
			return slices.MaxFunc(found, func(a, b string) int {
				if d := len(a) - len(b); d != 0 {
					return d
				}
				if a < b {
					return -1
				}
				return 1
			})
		}
	}
	return ""
}

func freePort(t *testing.T) int {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func (s *realServer) file(name string) string { return filepath.Join(s.dir, name) }

// command is a program of the server's, run by its user.
func (s *realServer) command(argv []string) (*exec.Cmd, error) {
	log, err := os.OpenFile(s.file("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(s.path[argv[0]], argv[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "TZ=UTC", "HOME=" + s.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.owner, Pdeathsig: s.kind.stop, Setpgid: true}
	return cmd, nil
}

// run runs a program to its end.
func (s *realServer) run(t *testing.T, argv ...string) {
	t.Helper()
	p, err := s.spawn(argv)
	require.NoError(t, err)
	<-p.left
	log, _ := os.ReadFile(s.file("log"))
	require.True(t, p.cmd.ProcessState.Success(), "%v: %v\n%s", argv, p.cmd.ProcessState, log)
}

// spawn starts a program. The kernel sends Pdeathsig when the *thread* ends that
// started it, so that one is kept until the program is gone.
func (s *realServer) spawn(argv []string) (*realProcess, error) {
	cmd, err := s.command(argv)
	if err != nil {
		return nil, err
	}
	p := &realProcess{cmd: cmd, left: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer cmd.Stdout.(*os.File).Close()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
			close(p.left)
		}
	}()
	return p, <-started
}

// start runs the server's processes and returns when all of them answer.
func (s *realServer) start() error {
	for _, argv := range s.kind.argv(s) {
		p, err := s.spawn(argv)
		if err != nil {
			s.stop(syscall.SIGKILL)
			return err
		}
		s.procs = append(s.procs, p)
	}
	deadline := time.Now().Add(realStartTime)
	for _, addr := range s.addrs() {
		for {
			err := s.asAdmin(addr, func(a *realAdmin) error { _, err := s.kind.conns(a); return err })
			if err == nil {
				break
			}
			for _, p := range s.procs {
				select {
				case <-p.left:
					s.stop(syscall.SIGKILL)
					return fmt.Errorf("%s ended at its start: %v (%w)", s.kind.name, p.cmd.ProcessState, err)
				default:
				}
			}
			if time.Now().After(deadline) {
				s.stop(syscall.SIGKILL)
				return fmt.Errorf("%s does not come up: %w", s.kind.name, err)
			}
			time.Sleep(realPoll)
		}
	}
	return nil
}

// stop ends the server by a signal, by force if that takes too long, and waits
// until its processes are gone.
func (s *realServer) stop(how syscall.Signal) {
	for _, p := range s.procs {
		p.cmd.Process.Signal(how)
	}
	late := time.NewTimer(realStartTime)
	defer late.Stop()
	for _, p := range s.procs {
		select {
		case <-p.left:
		case <-late.C:
			syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
			<-p.left
		}
	}
	if how == syscall.SIGKILL { // which left it no time to see to its children
		for _, p := range s.procs {
			syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		}
	}
	s.procs = nil
}

// restart stops the server and starts it again on the same port.
func (s *realServer) restart(t *testing.T, how syscall.Signal) {
	t.Helper()
	s.stop(how)
	var err error
	for range 5 { // its port, or its lock file, may be taken for a moment
		if err = s.start(); err == nil {
			return
		}
	}
	require.NoError(t, err)
}

// addrs are the ways to the server: TCP and a Unix socket.
func (s *realServer) addrs() []connpool.Addr {
	return []connpool.Addr{
		{Transport: connpool.TCP, Host: "127.0.0.1", Port: uint16(s.port)},
		{Transport: connpool.Unix, Host: s.socket()},
	}
}

// socket is named as postgres would do it, which lets nobody else choose.
func (s *realServer) socket() string { return s.file(".s.PGSQL." + strconv.Itoa(s.port)) }
