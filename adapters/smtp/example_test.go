package smtp_test

import (
	"context"
	"crypto/tls"
	"log"
	"os"
	"strings"

	"github.com/emersion/go-sasl"

	"github.com/seed-ecb488c9/connpool"
	poolsmtp "github.com/seed-ecb488c9/connpool/adapters/smtp"
)

func Example() {
	plain := sasl.NewPlainClient("", "app", os.Getenv("PASSWORD"))
	login := poolsmtp.Login{StartTLS: new(tls.Config), Auth: func(connpool.Addr) sasl.Client { return plain }}
	pool, err := connpool.New(connpool.Config{MaxPerAddr: 4, Setup: login.Setup, Check: poolsmtp.Check})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	client := poolsmtp.New(pool, connpool.MustParseAddr("tcp://mail.example:587"))
	taken, err := client.Send(context.Background(), "app@example.org", []string{"ada@example.org"}, nil,
		strings.NewReader("Subject: hello\r\n\r\nHello.\r\n"))
	log.Println(taken, err)
}
