//go:build unix

// Package realserver starts the distribution's servers for tests: on loopback, on a port
// that was free, in a folder of their own, and never as root. A server ends with its
// test; on Linux it also ends when the test's process is killed.
package realserver

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// startTime bounds the start of a server, and its end.
const startTime = 30 * time.Second

// Server is a running server.
type Server struct {
	Addr string // host and port
	Dir  string // the server writes only there

	left  chan struct{} // closed when the process is gone
	proc  *os.Process
	stop  syscall.Signal
	again func() *exec.Cmd // the command that started it
}

// Kind says how a server is started.
type Kind struct {
	Program string         // its name, see Find
	Package string         // the distribution's package that has it
	Stop    syscall.Signal // ends the server cleanly
	// Prepare runs before the first start, with a function that runs a
	// program as the user of the server. It may be nil.
	Prepare func(dir string, run func(argv ...string) error) error
	// Args are the arguments for a server on 127.0.0.1:port.
	Args func(dir string, port int) []string
}

// Redis is a redis-server that stores nothing on disk, with more arguments if given.
func Redis(more ...string) Kind {
	return Kind{
		Program: "redis-server", Package: "redis-server", Stop: syscall.SIGTERM,
		Args: func(dir string, port int) []string {
			return append([]string{"--bind", "127.0.0.1", "--port", strconv.Itoa(port), "--dir", dir,
				"--save", "", "--appendonly", "no", "--loglevel", "warning"}, more...)
		},
	}
}

// Postgres is a PostgreSQL that lets everybody in as the user "postgres", with more arguments if
// given. It listens before it lets anybody in.
func Postgres(more ...string) Kind {
	return Kind{
		Program: "postgres", Package: "postgresql", Stop: syscall.SIGINT,
		Prepare: func(dir string, run func(argv ...string) error) error {
			return run("initdb", "-D", filepath.Join(dir, "data"), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
		},
		Args: func(dir string, port int) []string {
			return append([]string{"-D", filepath.Join(dir, "data"), "-h", "127.0.0.1", "-p", strconv.Itoa(port), "-k", dir, "-F"}, more...)
		},
	}
}

// Slapd is an OpenLDAP server with the suffix dc=test, whose administrator cn=admin,dc=test has
// the password "secret". Everybody may read.
func Slapd() Kind {
	return Kind{
		Program: "slapd", Package: "slapd", Stop: syscall.SIGTERM,
		Prepare: func(dir string, _ func(argv ...string) error) error {
			for _, d := range []string{"data"} {
				if err := os.Mkdir(filepath.Join(dir, d), 0o777); err != nil {
					return err
				}
				if err := os.Chmod(filepath.Join(dir, d), 0o777); err != nil {
					return err
				}
			}
			return os.WriteFile(filepath.Join(dir, "slapd.conf"), []byte("include /etc/ldap/schema/core.schema\n"+
				"database ldif\ndirectory "+filepath.Join(dir, "data")+"\nsuffix dc=test\nrootdn cn=admin,dc=test\nrootpw secret\n"), 0o644)
		},
		Args: func(dir string, port int) []string {
			return []string{"-d", "0", "-f", filepath.Join(dir, "slapd.conf"), "-h", fmt.Sprintf("ldap://127.0.0.1:%d", port)}
		},
	}
}

// Dovecot is an IMAP server that lets everybody in with the password "secret".
func Dovecot() Kind {
	return Kind{
		Program: "dovecot", Package: "dovecot-imapd", Stop: syscall.SIGTERM,
		Args: func(dir string, port int) []string {
			name, group := "nobody", "nogroup"
			if os.Geteuid() != 0 {
				if u, err := user.Current(); err == nil {
					name, group = u.Username, u.Gid
				}
			}
			conf := filepath.Join(dir, "dovecot.conf")
			os.WriteFile(conf, fmt.Appendf(nil, `protocols = imap
listen = 127.0.0.1
base_dir = %[1]s/run
state_dir = %[1]s/state
log_path = %[1]s/dovecot.log
ssl = no
disable_plaintext_auth = no
default_internal_user = %[2]s
default_internal_group = %[3]s
default_login_user = %[2]s
first_valid_uid = 1
mail_max_userip_connections = 100
mail_location = maildir:%[1]s/mail
passdb {
  driver = static
  args = password=secret
}
userdb {
  driver = static
  args = uid=%[2]s gid=%[3]s home=%[1]s/home
}
service imap-login {
  chroot =
  inet_listener imap {
    port = %[4]d
  }
  inet_listener imaps {
    port = 0
  }
}
service anvil {
  chroot =
}
service stats {
  chroot =
}
`, dir, name, group, port), 0o644)
			return []string{"-F", "-c", conf}
		},
	}
}

// VSFTPD is an FTP server that lets everybody in as the user "anonymous", to read the folder
// "files" of its own folder. It writes each command that it gets to the file "vsftpd.log" there.
func VSFTPD() Kind {
	return Kind{
		Program: "vsftpd", Package: "vsftpd", Stop: syscall.SIGTERM,
		Prepare: func(dir string, run func(argv ...string) error) error {
			if err := os.Mkdir(filepath.Join(dir, "files"), 0o755); err != nil {
				return err
			}
			ours, conf := filepath.Join(dir, "conf"), filepath.Join(dir, "vsftpd.conf")
			err := os.WriteFile(ours, fmt.Appendf(nil, `listen=YES
listen_address=127.0.0.1
background=NO
run_as_launching_user=YES
one_process_model=YES
anonymous_enable=YES
no_anon_password=YES
anon_root=%[1]s/files
local_enable=NO
connect_from_port_20=NO
pasv_address=127.0.0.1
seccomp_sandbox=NO
isolate=NO
isolate_network=NO
secure_chroot_dir=%[1]s/files
xferlog_enable=YES
log_ftp_protocol=YES
vsftpd_log_file=%[1]s/vsftpd.log
`, dir), 0o644)
			if err != nil {
				return err
			}
			return run("cp", ours, conf) // it reads only a file of its own user
		},
		Args: func(dir string, port int) []string {
			return []string{filepath.Join(dir, "vsftpd.conf"), fmt.Sprintf("-olisten_port=%d", port)}
		},
	}
}

// MicroSOCKS is a SOCKS5 proxy that connects to everything. With a user, it asks for that user
// and password.
func MicroSOCKS(user, password string) Kind {
	return Kind{
		Program: "microsocks", Package: "microsocks", Stop: syscall.SIGTERM,
		Args: func(_ string, port int) []string {
			args := []string{"-i", "127.0.0.1", "-p", strconv.Itoa(port)}
			if user != "" {
				args = append(args, "-u", user, "-P", password)
			}
			return args
		},
	}
}

// Tinyproxy is an HTTP proxy that carries out CONNECT to every port, with more lines of its
// configuration if given.
func Tinyproxy(more ...string) Kind {
	return Kind{
		Program: "tinyproxy", Package: "tinyproxy-bin", Stop: syscall.SIGTERM,
		Args: func(dir string, port int) []string {
			conf := filepath.Join(dir, "tinyproxy.conf")
			os.WriteFile(conf, fmt.Appendf(nil, "Port %d\nListen 127.0.0.1\nTimeout 600\nMaxClients 100\nAllow 127.0.0.1\n%s\n",
				port, strings.Join(more, "\n")), 0o644)
			return []string{"-d", "-c", conf}
		},
	}
}

// Find returns the path of a program, from PATH or from where Debian puts servers. Of
// several versions it returns the newest. If the program is missing, Find skips the test.
func Find(t testing.TB, program, pkg string) string {
	t.Helper()
	if path, err := exec.LookPath(program); err == nil {
		return path
	}
	for _, pattern := range []string{"/usr/sbin", "/usr/lib/postgresql/*/bin"} {
		found, _ := filepath.Glob(filepath.Join(pattern, program))
		if len(found) > 0 {
			return slices.MaxFunc(found, func(a, b string) int {
				return cmp.Or(cmp.Compare(len(a), len(b)), strings.Compare(a, b))
			})
		}
	}
	t.Skipf("there is no %s on this machine: install the package %s", program, pkg)
	return ""
}

// Start starts a server and returns when it accepts connections.
func Start(t testing.TB, k Kind) *Server {
	t.Helper()
	path := Find(t, k.Program, k.Package)
	dir, err := os.MkdirTemp("", "rs") // short: a Unix socket's path has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	as := process()
	if os.Geteuid() == 0 {
		nobody, err := user.Lookup("nobody")
		if err != nil {
			t.Skipf("we are root, and there is no other user to run %s: %v", k.Program, err)
		}
		uid, _ := strconv.Atoi(nobody.Uid)
		gid, _ := strconv.Atoi(nobody.Gid)
		as.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	command := func(path string, argv ...string) *exec.Cmd {
		cmd := exec.Command(path, argv...)
		cmd.Dir, cmd.SysProcAttr = dir, as
		cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "TZ=UTC", "HOME=" + dir}
		return cmd
	}
	if k.Prepare != nil {
		err := k.Prepare(dir, func(argv ...string) error {
			out, err := command(Find(t, argv[0], k.Package), argv[1:]...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%v: %w\n%s", argv, err, out)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// A port that is free now may be taken when the server binds it.
	for range 5 {
		port, err := freePort()
		if err != nil {
			t.Fatal(err)
		}
		s := &Server{Addr: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), Dir: dir, stop: k.Stop}
		s.again = func() *exec.Cmd { return command(path, k.Args(dir, port)...) }
		if err = s.run(s.again()); err == nil {
			t.Cleanup(s.Stop)
			return s
		}
		t.Log(err)
	}
	log, _ := os.ReadFile(filepath.Join(dir, "log"))
	t.Fatalf("%s does not start, in five tries on five ports:\n%s", k.Program, log)
	return nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// run starts the process and waits until it listens.
func (s *Server) run(cmd *exec.Cmd) error {
	log, err := os.OpenFile(filepath.Join(s.Dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	cmd.Stdout, cmd.Stderr = log, log
	left := make(chan struct{})
	s.left = left
	started := make(chan error)
	go func() {
		// The kernel ends the server when the thread that started it ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer log.Close()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
			close(left)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	s.proc = cmd.Process
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		if nc, err := new(net.Dialer).DialContext(ctx, "tcp", s.Addr); err == nil {
			nc.Close()
			return nil
		}
		select {
		case <-s.left:
			return fmt.Errorf("%s ended at its start: %v", cmd.Path, cmd.ProcessState)
		case <-ctx.Done():
			s.Stop()
			return fmt.Errorf("%s does not listen", cmd.Path)
		case <-again.C:
		}
	}
}

// Restart ends the server and starts it again, on the same port.
func (s *Server) Restart(t testing.TB) {
	t.Helper()
	s.Stop()
	if err := s.run(s.again()); err != nil {
		t.Fatal(err)
	}
}

// Stop ends the server, by force if that takes too long, and returns when it has ended.
// It may be called again.
func (s *Server) Stop() {
	s.proc.Signal(s.stop)
	select {
	case <-s.left:
	case <-time.After(startTime):
		s.proc.Kill()
		<-s.left
	}
}
