package connpool_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"strings"
	"time"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/tasks"
)

// The examples talk to servers of their own. serve runs handle for each
// connection to a free port of the loopback; stop waits until all have ended.
func serve(handle func(net.Conn)) (address string, stop func()) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	var running tasks.Group
	running.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer nc.Close()
				handle(nc)
			})
		}
	})
	return l.Addr().String(), func() { l.Close(); running.Wait() }
}

// lines serves a protocol of one line there and what answer makes of it back.
func lines(answer func(string) string) func(net.Conn) {
	return func(nc net.Conn) {
		for in := bufio.NewScanner(nc); in.Scan(); {
			fmt.Fprint(nc, answer(in.Text()))
		}
	}
}

func ExamplePool_With() {
	address, stop := serve(lines(func(s string) string { return strings.ToUpper(s) + "\n" }))
	defer stop()

	pool, err := connpool.New(connpool.Config{
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return bufio.NewReader(nc), nil // lives as long as the connection
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	addr := connpool.MustParseAddr("tcp://" + address)
	for _, word := range []string{"hello", "again"} {
		err = pool.With(context.Background(), addr, func(c connpool.Conn) error {
			if _, err := io.WriteString(c, word+"\n"); err != nil {
				return err
			}
			reply, err := connpool.State[*bufio.Reader](c).ReadString('\n')
			fmt.Printf("%q on connection %d, used before: %t\n", reply, c.Info().ID, c.Info().Reused)
			return err
		})
		if err != nil {
			log.Fatal(err)
		}
	}
	// Output:
	// "HELLO\n" on connection 1, used before: false
	// "AGAIN\n" on connection 1, used before: true
}

func ExampleKeep() {
	address, stop := serve(lines(func(string) string { return "NONE\n" }))
	defer stop()
	pool, err := connpool.New(connpool.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	addr := connpool.MustParseAddr("tcp://" + address)

	errNotFound := errors.New("not found")
	get := func(verdict func(error) error) error {
		return pool.With(context.Background(), addr, func(c connpool.Conn) error {
			if _, err := io.WriteString(c, "GET colour\n"); err != nil {
				return err
			}
			var reply [5]byte
			if _, err := io.ReadFull(c, reply[:]); err != nil {
				return err
			}
			return verdict(errNotFound) // the exchange is complete
		})
	}

	err = get(connpool.Keep)
	fmt.Println(err == errNotFound, "- idle:", pool.Stats().Idle)

	err = get(func(err error) error { return err }) // no Keep: closed, to be safe
	fmt.Println(err == errNotFound, "- idle:", pool.Stats().Idle)
	// Output:
	// true - idle: 1
	// true - idle: 0
}

func ExampleConfig_keepErr() {
	address, stop := serve(lines(func(string) string { return "NONE\n" }))
	defer stop()
	errNotFound := errors.New("not found")
	pool, err := connpool.New(connpool.Config{
		KeepErr: func(_ connpool.Addr, err error) bool { return errors.Is(err, errNotFound) },
	})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	err = pool.With(context.Background(), connpool.MustParseAddr("tcp://"+address), func(c connpool.Conn) error {
		if _, err := io.WriteString(c, "GET colour\n"); err != nil {
			return err
		}
		var reply [5]byte
		if _, err := io.ReadFull(c, reply[:]); err != nil {
			return err
		}
		return errNotFound // no Keep
	})
	fmt.Println(err == errNotFound, "- idle:", pool.Stats().Idle)
	// Output:
	// true - idle: 1
}

// codec is that of a connection, with a buffer for each direction.
type codec struct {
	in   *bufio.Reader
	out  *bufio.Writer
	sent int
}

// Buffered counts what is in both halves: bytes left unread, and bytes that were
// not flushed. The pool asks for it when the connection is given back. (It would
// find these two fields by itself; a buffer of another kind, or one that is further
// away, it would not.)
func (k *codec) Buffered() int { return k.in.Buffered() + k.out.Buffered() }

func ExampleState() {
	address, stop := serve(lines(func(s string) string { return s + "\n" + "and more\n" }))
	defer stop()

	pool, err := connpool.New(connpool.Config{
		Setup: func(_ context.Context, _ connpool.Addr, nc net.Conn) (any, error) {
			return &codec{in: bufio.NewReader(nc), out: bufio.NewWriter(nc)}, nil
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	addr := connpool.MustParseAddr("tcp://" + address)

	ask := func(replyLines int, flush bool) error {
		return pool.With(context.Background(), addr, func(c connpool.Conn) error {
			k := connpool.State[*codec](c)
			k.sent++
			fmt.Fprintf(k.out, "request %d of connection %d\n", k.sent, c.Info().ID)
			if !flush {
				return nil // it must not go out with somebody else's request
			}
			if err := k.out.Flush(); err != nil {
				return err
			}
			for range replyLines {
				line, err := k.in.ReadString('\n')
				if err != nil {
					return err
				}
				fmt.Print(line)
			}
			return nil
		})
	}
	for _, n := range []int{2, 1, 0, 2} { // the second leaves a line unread, the third does not flush
		if err := ask(n, n > 0); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(pool.Stats().Closed)
	// Output:
	// request 1 of connection 1
	// and more
	// request 2 of connection 1
	// request 1 of connection 3
	// and more
	// map[dirty:2]
}

func ExampleConn_Detach() {
	address, stop := serve(func(nc net.Conn) {
		if _, err := bufio.NewReader(nc).ReadString('\n'); err == nil {
			io.WriteString(nc, "first event\nlast event\n")
		}
	})
	defer stop()
	pool, err := connpool.New(connpool.Config{})
	if err != nil {
		log.Fatal(err)
	}

	var feed net.Conn
	addr := connpool.MustParseAddr("tcp://" + address)
	err = pool.With(context.Background(), addr, func(c connpool.Conn) error {
		if _, err := io.WriteString(c, "SUBSCRIBE\n"); err != nil {
			return err
		}
		var err error
		feed, err = c.Detach() // from here on it is ours, and ours to close
		return err
	})
	if err != nil {
		log.Fatal(err)
	}
	defer feed.Close()
	fmt.Println("open:", pool.Stats().Open)
	pool.Close()

	for in := bufio.NewScanner(feed); in.Scan(); {
		fmt.Println(in.Text())
	}
	// Output:
	// open: 0
	// first event
	// last event
}

func ExampleWithTrace() {
	address, stop := serve(lines(func(string) string { return "." }))
	defer stop()
	pool, err := connpool.New(connpool.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	ctx := connpool.WithTrace(context.Background(), &connpool.Trace{
		GetConn: func(connpool.Addr) { fmt.Println("asks") },
		Wait:    func(i connpool.WaitInfo) { fmt.Println("waits, as number", i.Waiting) },
		GotConn: func(i connpool.GotInfo) { fmt.Printf("gets connection %d for its use number %d\n", i.ID, i.Uses) },
		PutConn: func(i connpool.PutInfo) { fmt.Println("gives back connection", i.ID) },
	})
	for range 2 {
		err := pool.With(ctx, connpool.MustParseAddr("tcp://"+address), func(c connpool.Conn) error {
			_, err := io.WriteString(c, "?\n")
			if err == nil {
				_, err = io.ReadFull(c, make([]byte, 1))
			}
			return err
		})
		if err != nil {
			log.Fatal(err)
		}
	}
	// Output:
	// asks
	// waits, as number 1
	// gets connection 1 for its use number 1
	// gives back connection 1
	// asks
	// gets connection 1 for its use number 2
	// gives back connection 1
}

func ExampleParseAddr() {
	a, err := connpool.ParseAddr("tls://DB.Example.:5432?scope=tenant7&dscp=46")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(a)
	fmt.Println(a == connpool.Addr{
		Transport: connpool.TLS, Host: "db.example", Port: 5432,
		Scope: "tenant7", QoS: connpool.QoS{DSCP: 46},
	})

	_, err = connpool.ParseAddr("tls://db.example:5432?dscp=99")
	fmt.Println(err)
	// Output:
	// tls://db.example:5432?dscp=46&scope=tenant7
	// true
	// connpool: ParseAddr("tls://db.example:5432?dscp=99"): dscp: use a whole number, 0 to 63 (at "dscp=99")
}

func ExampleNetAddr() {
	a, err := connpool.NetAddr("tcp", "[2001:DB8::1]:https")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(a)
	a.Transport = connpool.TLS
	fmt.Println(a)

	_, err = connpool.NetAddr("tcp", ":80")
	fmt.Println(err)
	// Output:
	// tcp://[2001:db8::1]:443
	// tls://[2001:db8::1]:443
	// connpool: NetAddr("tcp", ":80"): the host is left out: name it, as in localhost:80
}

func ExampleAddrOf() {
	a, err := connpool.AddrOf(&net.TCPAddr{IP: net.IPv4(10, 0, 0, 7), Port: 502})
	fmt.Println(a, err)
	// Output:
	// tcp://10.0.0.7:502 <nil>
}

func ExampleAddr_HostPort() {
	fmt.Println(connpool.MustParseAddr("tls://[::1]:5432?scope=tenant7").HostPort())
	fmt.Println(connpool.MustParseAddr("unix:/run/x.sock").HostPort())
	// Output:
	// [::1]:5432
	// /run/x.sock
}

func ExampleError() {
	address, stop := serve(lines(func(string) string { return "" }))
	defer stop()
	pool, err := connpool.New(connpool.Config{MaxPerAddr: 1, WhenFull: connpool.FullFail})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	addr := connpool.MustParseAddr("tcp://" + address)
	err = pool.With(context.Background(), addr, func(connpool.Conn) error {
		// The only connection is in use, by ourselves.
		return pool.With(context.Background(), addr, func(connpool.Conn) error { return nil })
	})
	var e *connpool.Error
	if errors.As(err, &e) {
		fmt.Printf("stage %v, kind %v: %d of %d in use, the limit is %s\n", e.Stage, e.Kind, e.InUse, e.Limit, e.LimitName)
	}
	fmt.Println(errors.Is(err, connpool.ErrExhausted))
	// Output:
	// stage wait, kind resource: 1 of 1 in use, the limit is MaxPerAddr
	// true
}

// ExampleConfig_dialers pools connections that never leave the process.
func ExampleConfig_dialers() {
	var serving tasks.Group
	defer serving.Wait()
	pool, err := connpool.New(connpool.Config{
		Dialers: map[connpool.Transport]connpool.DialFunc{
			"inproc": func(_ context.Context, addr connpool.Addr) (net.Conn, error) {
				here, there := net.Pipe()
				serving.Go(func() {
					defer there.Close()
					lines(func(s string) string { return addr.Host + " got " + s + "\n" })(there)
				})
				return here, nil
			},
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	for range 2 {
		err = pool.With(context.Background(), connpool.MustParseAddr("inproc://orders"), func(c connpool.Conn) error {
			if _, err := io.WriteString(c, "a pair of shoes\n"); err != nil {
				return err
			}
			reply := make([]byte, len("orders got a pair of shoes\n"))
			_, err := io.ReadFull(c, reply)
			fmt.Print(string(reply))
			return err
		})
		if err != nil {
			log.Fatal(err)
		}
	}
	// A pipe has no descriptor that could be asked whether the peer is there.
	st := pool.Stats()
	fmt.Println("dials:", st.Dials, "unprobed:", st.Unprobed)

	err = pool.With(context.Background(), connpool.MustParseAddr("pigeon://roof"), func(connpool.Conn) error { return nil })
	fmt.Println(err)
	// Output:
	// orders got a pair of shoes
	// orders got a pair of shoes
	// dials: 1 unprobed: 1
	// connpool: usage pigeon://roof: no dialer for transport "pigeon": set Config.Dialers["pigeon"]
}

// Example_tls verifies a name that is not the host it connects to.
func Example_tls() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	self := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"db.example"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, self, self, key.Public(), key)
	if err != nil {
		log.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		log.Fatal(err)
	}
	server := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	address, stop := serve(func(nc net.Conn) {
		lines(func(string) string { return "pong" })(tls.Server(nc, server))
	})
	defer stop()

	trust := x509.NewCertPool()
	trust.AddCert(cert)
	pool, err := connpool.New(connpool.Config{TLS: &tls.Config{RootCAs: trust}})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	ping := func(addr string) error {
		return pool.With(context.Background(), connpool.MustParseAddr(addr), func(c connpool.Conn) error {
			if _, err := io.WriteString(c, "ping\n"); err != nil {
				return err
			}
			var reply [4]byte
			_, err := io.ReadFull(c, reply[:])
			fmt.Printf("%s from %s, used before: %t\n", reply, c.ConnectionState().ServerName, c.Info().Reused)
			return err
		})
	}
	for range 2 {
		if err := ping("tls://" + address + "?server-name=db.example"); err != nil {
			log.Fatal(err)
		}
	}
	err = ping("tls://" + address + "?server-name=other.example") // another key, another handshake
	fmt.Println(errors.As(err, new(x509.HostnameError)), connpool.KindOf(err))
	// Output:
	// pong from db.example, used before: false
	// pong from db.example, used before: true
	// true bad message
}

// A made-up protocol of the kind that has grown in a plant for twenty years. A
// frame is a verb, the length of the body in two bytes, the body, and the sum
// of all bytes before in two bytes.
const (
	plantLogin = 'L'
	plantRead  = 'R'
	plantYes   = 'Y'
	plantNo    = 'N'
)

var errChecksum = errors.New("wrong checksum")

func plantSum(b []byte) (sum uint16) {
	for _, c := range b {
		sum += uint16(c)
	}
	return sum
}

func writePlant(w io.Writer, verb byte, body string) error {
	b := binary.BigEndian.AppendUint16([]byte{verb}, uint16(len(body)))
	b = append(b, body...)
	_, err := w.Write(binary.BigEndian.AppendUint16(b, plantSum(b)))
	return err
}

func readPlant(r io.Reader) (verb byte, body string, err error) {
	b := make([]byte, 3)
	if _, err := io.ReadFull(r, b); err != nil {
		return 0, "", err
	}
	n := int(binary.BigEndian.Uint16(b[1:]))
	b = append(b, make([]byte, n+2)...)
	if _, err := io.ReadFull(r, b[3:]); err != nil {
		return 0, "", err
	}
	if b, sum := b[:3+n], b[3+n:]; plantSum(b) != binary.BigEndian.Uint16(sum) {
		return 0, "", errChecksum
	}
	return b[0], string(b[3 : 3+n]), nil
}

// servePlant is a machine of the plant: it wants a login first, and has one
// register on a bad line.
func servePlant(nc net.Conn) {
	registers := map[string]string{"pressure": "4.2", "speed": "1500"}
	known := false
	for {
		verb, body, err := readPlant(nc)
		switch {
		case err != nil:
			return
		case verb == plantLogin:
			known = body == "line3:secret"
			err = writePlant(nc, plantYes, "")
		case !known:
			err = writePlant(nc, plantNo, "log in first")
		case body == "noisy":
			_, err = nc.Write([]byte{plantYes, 0, 1, '?', 0xff, 0xff})
		case registers[body] == "":
			err = writePlant(nc, plantNo, "no register "+body)
		default:
			err = writePlant(nc, plantYes, registers[body])
		}
		if err != nil {
			return
		}
	}
}

// Example_legacyProtocol pools a proprietary binary protocol: the login is paid
// once per connection, and a frame that arrived damaged costs the connection.
//
// ORA-72
func Example_legacyProtocol() {
	address, stop := serve(servePlant)
	defer stop()

	passwords := map[string]string{"line3": "secret"} // addresses are shown in logs, and hold none
	pool, err := connpool.New(connpool.Config{
		Setup: func(_ context.Context, addr connpool.Addr, nc net.Conn) (any, error) {
			fmt.Println("login of", addr.Scope)
			if err := writePlant(nc, plantLogin, addr.Scope+":"+passwords[addr.Scope]); err != nil {
				return nil, err
			}
			verb, _, err := readPlant(nc)
			if err == nil && verb != plantYes {
				err = errors.New("login refused")
			}
			return nil, err
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	addr := connpool.MustParseAddr("tcp://" + address + "?scope=line3")
	read := func(register string) (value string, err error) {
		err = pool.With(context.Background(), addr, func(c connpool.Conn) error {
			if err := writePlant(c, plantRead, register); err != nil {
				return err
			}
			verb, body, err := readPlant(c)
			switch {
			case err != nil:
				return err // out of step
			case verb != plantYes:
				return connpool.Keep(errors.New(body)) // refused, but in step
			}
			value = body
			return nil
		})
		return value, err
	}
	for _, register := range []string{"pressure", "colour", "noisy", "speed"} {
		value, err := read(register)
		fmt.Printf("%s: %q, error: %v\n", register, value, err)
	}
	fmt.Println(pool.Stats().Closed)
	// Output:
	// login of line3
	// pressure: "4.2", error: <nil>
	// colour: "", error: no register colour
	// noisy: "", error: wrong checksum
	// login of line3
	// speed: "1500", error: <nil>
	// map[fn-error:1]
}
